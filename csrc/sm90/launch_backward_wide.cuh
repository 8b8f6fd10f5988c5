// Host side of the backward for wide heads: dK and dV.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "sm90/backward_wide.cuh"

namespace jfa::sm90 {

template <class Element, class Shape, bool kGeneral>
Status launch_backward_wide_tile(const Problem& p, const Gradients& g, uint32_t* counter, int multiprocessors,
                                 cudaStream_t stream) {
  using Smem = BackwardWideSmem<Shape>;
  static_assert(sizeof(Smem) <= Shape::kSharedBytes && Shape::kSharedBytes <= kSharedMemoryLimit,
                "a tile of backward_wide_tiles.h does not fit into shared memory");
  if (!Shape::kAnyVisibility && reads_visibility_backward(p))
    return Status::Internal("a tile that takes only formulas");
  const bool by_sequence = tiles_sequences_backward(p);
  BackwardWideArguments a;
  a.p = p;
  a.g = g;
  a.order = backward_wide_order(p, Shape::kClusterKeys);
  a.counter = counter;
  const jfa::Shape& s = p.shape;
  const bool has_queries = s.q_len > 0;  // an empty array may have no address
  Status status =
      make_tensor_map(a.q, has_queries ? p.q : p.k, p.type, s.head_dim, s.q_len, s.heads, s.batch, Shape::kQ);
  if (status.ok())
    status =
        make_tensor_map(a.d_o, has_queries ? g.d_o : p.v, p.type, s.value_dim, s.q_len, s.heads, s.batch, Shape::kQ);
  if (status.ok()) status = make_tensor_map(a.k, p.k, p.type, s.head_dim, s.k_len, s.kv_heads, s.batch, Shape::kKeys);
  if (status.ok()) status = make_tensor_map(a.v, p.v, p.type, s.value_dim, s.k_len, s.kv_heads, s.batch, Shape::kKeys);
  if (status.ok()) status = stage_scores<Shape>(a, p, Shape::kQ, Shape::kKeys);
  if (!status.ok()) return status;
  if (by_sequence) status = launch_tile_sequences<Sm90>(a.tiles, p, a.order, Shape::kClusterKeys, true, stream);
  if (!status.ok()) return status;
  const int64_t workers = std::min(a.order.items, std::max(multiprocessors / Shape::kCluster, 1));
  return launch("jax_flashattn sm90 backward_wide", backward_wide<Element, Shape, kGeneral>,
                Grid{workers * Shape::kCluster, Shape::kThreads, Shape::kSharedBytes, Shape::kCluster}, stream, a);
}

// `counter`: scratch, one number that is 0.
template <class Element, int kHeadDim>
Status launch_backward_wide(const Problem& p, const Gradients& g, uint32_t* counter, int multiprocessors,
                            cudaStream_t stream) {
  if (p.shape.batch == 0 || p.shape.kv_heads == 0 || p.shape.k_len == 0) return Status::Ok();
  const int64_t rows = int64_t(p.shape.k_len + kWarpgroupRows) * p.shape.kv_heads * p.shape.batch;
  if (key_tiles(p, kWarpgroupRows) * p.shape.kv_heads * p.shape.batch > kMaxItems) {
    return Status::Unimplemented("batch x key/value heads x key length is " + std::to_string(rows) +
                                 ", too many for the work items of family sm90; the nearest is sm80");
  }
  return with_backward_wide_tile<kHeadDim>(p, [&](auto tile, auto general) {
    using Shape = typename decltype(tile)::type;
    return launch_backward_wide_tile<Element, Shape, general.value>(p, g, counter, multiprocessors, stream);
  });
}

}  // namespace jfa::sm90
