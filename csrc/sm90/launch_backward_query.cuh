// Host side of the Hopper kernel for dQ.
#pragma once

#include <algorithm>

#include "sm90/backward_query.cuh"
#include "sm90/backward_query_tiles.h"

namespace jfa::sm90 {

template <class Element, class Shape, bool kGeneral>
Status launch_backward_query_tile(const Problem& p, const Gradients& g, uint32_t* counter, int multiprocessors,
                                  cudaStream_t stream) {
  using Smem = BackwardQuerySmem<Shape>;
  static_assert(sizeof(Smem) <= Shape::kSharedBytes && Shape::kSharedBytes <= kSharedMemoryLimit,
                "a tile of backward_query_tiles.h does not fit into shared memory");
  if (!Shape::kAnyVisibility && reads_visibility_backward(p))
    return Status::Internal("a tile that takes only formulas");
  const bool by_sequence = tiles_sequences_backward(p);
  BackwardQueryArguments a;
  a.p = p;
  a.g = g;
  a.order = forward_order(p, Shape::kQ, 1, by_sequence);
  a.counter = counter;
  const jfa::Shape& s = p.shape;
  const bool has_keys = s.k_len > 0;  // an empty array may have no address
  const auto map = [&](TensorMap& map, const Tensor& tensor, int dim, int length, int heads, int rows) {
    return make_tensor_map(map, tensor, p.type, dim, length, heads, s.batch, rows);
  };
  Status status = map(a.q, p.q, s.head_dim, s.q_len, s.heads, kWarpgroupRows);
  if (status.ok()) status = map(a.d_o, g.d_o, s.value_dim, s.q_len, s.heads, kWarpgroupRows);
  if (status.ok()) status = map(a.k, has_keys ? p.k : p.q, s.head_dim, s.k_len, s.kv_heads, Shape::kK);
  if (status.ok()) status = map(a.v, has_keys ? p.v : g.d_o, s.value_dim, s.k_len, s.kv_heads, Shape::kK);
  if (status.ok()) status = stage_scores<Shape>(a, p, kWarpgroupRows, Smem::StagedMask::kCols);
  if (!status.ok()) return status;
  const int64_t blocks = std::min(a.order.items, std::max(multiprocessors, 1));
  if (a.order.items <= blocks) a.order.drawn = false;  // one for each
  if (by_sequence) status = launch_tile_sequences<Sm90>(a.tiles, p, a.order, Shape::kQ, false, stream);
  if (!status.ok()) return status;
  return launch("jax_flashattn sm90 backward_query", backward_query<Element, Shape, kGeneral>,
                Grid{blocks, Shape::kThreads, Shape::kSharedBytes}, stream, a);
}

// `counter` is 0 when the kernel begins.
template <class Element, int kHeadDim>
Status launch_backward_query(const Problem& p, const Gradients& g, uint32_t* counter, int multiprocessors,
                             cudaStream_t stream) {
  if (p.shape.batch == 0 || p.shape.heads == 0 || p.shape.q_len == 0) return Status::Ok();
  const int64_t rows = int64_t(p.shape.q_len + kWarpgroupRows) * p.shape.heads * p.shape.batch;
  const int64_t tiles = tiles_of(p, p.shape.q_len, kWarpgroupRows, tiles_sequences_backward(p));
  if (tiles * p.shape.heads * p.shape.batch > kMaxItems) {
    return Status::Unimplemented("batch x heads x query length is " + std::to_string(rows) +
                                 ", too many for the work items of family sm90; the nearest is sm80");
  }
  return with_backward_query_tile<kHeadDim>(p, [&](auto tile, auto general) {
    using Shape = typename decltype(tile)::type;
    return launch_backward_query_tile<Element, Shape, general.value>(p, g, counter, multiprocessors, stream);
  });
}

}  // namespace jfa::sm90
