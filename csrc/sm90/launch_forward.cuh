// Host side of the Hopper forward.
#pragma once

#include <algorithm>

#include "common/visibility.cuh"
#include "sm90/family.h"
#include "sm90/forward.cuh"

namespace jfa::sm90 {

template <class Element, class Shape, bool kGeneral>
Status launch_forward_tile(const Problem& p, uint32_t* counter, int multiprocessors, cudaStream_t stream) {
  using Smem = ForwardSmem<Shape>;
  static_assert(sizeof(Smem) <= Shape::kSharedBytes && Shape::kSharedBytes <= kSharedMemoryLimit,
                "a tile of tiles.h does not fit into shared memory");
  if (!Shape::kAnyVisibility && reads_visibility(p)) return Status::Internal("a tile that takes only formulas");
  ForwardArguments a;
  a.p = p;
  a.order = forward_order<Shape>(p);
  a.counter = counter;
  const jfa::Shape& s = p.shape;
  const bool has_keys = s.k_len > 0;  // an empty array may have no address
  Status status = make_tensor_map(a.q, p.q, p.type, s.head_dim, s.q_len, s.heads, s.batch, Shape::kQ);
  if (status.ok())
    status = make_tensor_map(a.k, has_keys ? p.k : p.q, p.type, s.head_dim, s.k_len, s.kv_heads, s.batch, Shape::kK);
  if (status.ok())
    status = make_tensor_map(a.v, has_keys ? p.v : p.o, p.type, s.value_dim, s.k_len, s.kv_heads, s.batch, Shape::kK);
  if (status.ok()) status = make_tensor_map(a.o, p.o, p.type, s.value_dim, s.q_len, s.heads, s.batch, kOutputRows);
  if (status.ok()) status = stage_scores<Shape>(a, p, kWarpgroupRows, Shape::kK);
  if (!status.ok()) return status;
  const int64_t workers = std::min(a.order.items, std::max(multiprocessors / Shape::kCluster, 1));
  if (a.order.items <= workers) a.order.drawn = false;  // one for each, and nothing to clear before
  if (tiles_sequences(p)) {
    const int rows = Shape::kClusterQ / a.order.item_heads;
    status = launch_tile_sequences<Sm90>(a.tiles, p, a.order, rows, false, stream, counter);
  } else {
    status = launch_prepare_visibility<Sm90>(p, stream, counter);
  }
  if (!status.ok()) return status;
  if (a.order.drawn && !needs_table(p.visibility)) {
    status = cuda_status(cudaMemsetAsync(counter, 0, sizeof(*counter), stream),
                         "jax_flashattn: clearing the counter of work items");
    if (!status.ok()) return status;
  }
  return launch("jax_flashattn sm90 forward", forward<Element, Shape, kGeneral>,
                Grid{workers * Shape::kCluster, Shape::kThreads, Shape::kSharedBytes, Shape::kCluster}, stream, a);
}

template <int kHeadDim>
Status launch_forward(const Problem& p, uint32_t* counter, int multiprocessors, cudaStream_t stream) {
  if (p.shape.batch == 0 || p.shape.heads == 0 || p.shape.q_len == 0) return Status::Ok();
  const int64_t rows = int64_t(p.shape.q_len + kWarpgroupRows) * p.shape.heads * p.shape.batch;
  if (tiles_of(p, p.shape.q_len, kWarpgroupRows, tiles_sequences(p)) * p.shape.heads * p.shape.batch > kMaxItems) {
    return Status::Unimplemented("batch x heads x query length is " + std::to_string(rows) +
                                 ", too many for the work items of family sm90; the nearest is sm80");
  }
  return with_element(p.type, [&](auto element) {
    using Element = typename decltype(element)::type;
    return with_forward_tile<kHeadDim>(p, multiprocessors, [&](auto tile, auto general) {
      using Shape = typename decltype(tile)::type;
      return launch_forward_tile<Element, Shape, general.value>(p, counter, multiprocessors, stream);
    });
  });
}

}  // namespace jfa::sm90
