// Host side of the Hopper backward: delta, then dK and dV with dQ's accumulator, then dQ.
#pragma once

#include <algorithm>

#include "common/prepare_backward.cuh"
#include "common/visibility.cuh"
#include "dispatch.h"
#include "sm90/backward.cuh"
#include "sm90/family.h"
#include "sm90/launch_backward_query.cuh"
#include "sm90/launch_backward_wide.cuh"
#include "sm90/store_dq.cuh"

namespace jfa::sm90 {

// dK, dV and dQ.
template <class Element, class Shape, bool kGeneral>
Status launch_key_gradients(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream) {
  static_assert(sizeof(BackwardSmem<Shape>) <= Shape::kSharedBytes && Shape::kSharedBytes <= kSharedMemoryLimit,
                "a tile of backward_tiles.h does not fit into shared memory");
  const jfa::Shape& s = p.shape;
  const int64_t keys = (int64_t(s.k_len) + Shape::kK) * s.kv_heads * s.batch;
  if (key_tiles(p, Shape::kK) * s.kv_heads * s.batch > kMaxItems) {
    return Status::Unimplemented("batch x key/value heads x key length is " + std::to_string(keys) +
                                 ", too many for the work items of family sm90; the nearest is sm80");
  }
  if (!Shape::kAnyVisibility && reads_visibility_backward(p))
    return Status::Internal("a tile that takes only formulas");
  const bool by_sequence = tiles_sequences_backward(p);
  BackwardArguments a;
  a.p = p;
  a.g = g;
  a.order = backward_order(p, Shape::kQ, Shape::kK, g.deterministic);
  Status status = Status::Ok();
  if (by_sequence) status = launch_tile_sequences<Sm90>(a.tiles, p, a.order, Shape::kK, true, stream);
  if (status.ok() && a.order.items > 0) {
    const bool has_queries = s.q_len > 0;  // an empty array may have no address
    status = make_tensor_map(a.q, has_queries ? p.q : p.k, p.type, s.head_dim, s.q_len, s.heads, s.batch, Shape::kQ);
    if (status.ok()) status = make_tensor_map(a.k, p.k, p.type, s.head_dim, s.k_len, s.kv_heads, s.batch, Shape::kK);
    if (status.ok()) status = make_tensor_map(a.v, p.v, p.type, s.value_dim, s.k_len, s.kv_heads, s.batch, Shape::kK);
    if (status.ok()) {
      status =
          make_tensor_map(a.d_o, has_queries ? g.d_o : p.v, p.type, s.value_dim, s.q_len, s.heads, s.batch, Shape::kQ);
    }
    if (status.ok()) status = stage_scores<Shape>(a, p, Shape::kQ, Shape::kK);
    if (!status.ok()) return status;
    const int64_t workers = std::min(a.order.items, std::max(multiprocessors, 1));
    status = launch("jax_flashattn sm90 backward", backward<Element, Shape, kGeneral>,
                    Grid{workers, Shape::kThreads, Shape::kSharedBytes}, stream, a);
  }
  if (!status.ok()) return status;
  return launch("jax_flashattn sm90 store_dq", store_dq<Element, Shape>,
                Grid{query_tiles(p, Shape::kQ) * s.heads * s.batch, kStoreThreads, sizeof(StoreSmem<Shape>)}, stream, p,
                g);
}

template <int kHeadDim>
Status launch_backward(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream) {
  return with_element(p.type, [&](auto element) {
    using Element = typename decltype(element)::type;
    Status status = tiles_sequences_backward(p) ? Status::Ok() : launch_prepare_visibility<Sm90>(p, stream);
    if (status.ok()) status = launch_prepare_backward<Element, Sm90>(p, g, stream);
    if (!status.ok()) return status;
    if constexpr (kHeadDim <= 128) {
      status = with_backward_tile<kHeadDim>(p, [&](auto tile, auto general) {
        using Shape = typename decltype(tile)::type;
        return launch_key_gradients<Element, Shape, general.value>(p, g, multiprocessors, stream);
      });
    } else {
      status = launch_backward_wide<Element, kHeadDim>(p, g, g.counters, multiprocessors, stream);
      if (status.ok()) status = launch_backward_query<Element, kHeadDim>(p, g, g.counters + 1, multiprocessors, stream);
    }
    return status;
  });
}

}  // namespace jfa::sm90
