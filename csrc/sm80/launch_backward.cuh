// Host side of the portable backward: delta, then dK and dV with dQ's accumulator, then dQ.
#pragma once

#include "common/prepare_backward.cuh"
#include "common/visibility.cuh"
#include "dispatch.h"
#include "sm80/backward.cuh"
#include "sm80/backward_query.cuh"
#include "sm80/family.h"

namespace jfa::sm80 {

template <class Element, int kHeadDim>
Status launch_dq(const Problem& p, const Gradients& g, cudaStream_t stream) {
  if (g.deterministic) {
    using Shape = RecomputeTile<kHeadDim>;
    const int64_t blocks = int64_t(ceil_div(p.shape.q_len, Shape::kQ)) * p.shape.heads * p.shape.batch;
    return launch("jax_flashattn sm80 backward_query", backward_query<Element, kHeadDim>,
                  Grid{blocks, Shape::kThreads, sizeof(RecomputeSmem<kHeadDim>)}, stream, p, g);
  }
  using Shape = BackwardTile<kHeadDim>;
  const int64_t blocks = int64_t(ceil_div(p.shape.q_len, Shape::kQ)) * p.shape.heads * p.shape.batch;
  return launch("jax_flashattn sm80 store_dq", store_dq<Element, kHeadDim>,
                Grid{blocks, Shape::kThreads, sizeof(Tile<Shape::kQ, kHeadDim>)}, stream, p, g);
}

template <int kHeadDim>
Status launch_backward(const Problem& p, const Gradients& g, cudaStream_t stream) {
  using Shape = BackwardTile<kHeadDim>;
  using Smem = BackwardSmem<kHeadDim>;
  static_assert(sizeof(Smem) == Shape::kSharedBytes, "tiles.h and the kernel disagree");
  static_assert(sizeof(Smem) <= kSharedMemoryLimit && sizeof(RecomputeSmem<kHeadDim>) <= kSharedMemoryLimit,
                "a tile of tiles.h exceeds the shared memory of sm_86");
  const int64_t key_tiles = int64_t(ceil_div(p.shape.k_len, Shape::kK)) * p.shape.kv_heads * p.shape.batch;
  return with_element(p.type, [&](auto element) {
    using Element = typename decltype(element)::type;
    Status status = launch_prepare_visibility<Sm80>(p, stream);
    if (status.ok()) status = launch_prepare_backward<Element, Sm80>(p, g, stream);
    if (!status.ok()) return status;
    status = with_bool(runs_general(p), [&](auto general) {
      return launch("jax_flashattn sm80 backward", backward<Element, kHeadDim, general.value>,
                    Grid{key_tiles, Shape::kThreads, sizeof(Smem)}, stream, p, g);
    });
    if (status.ok()) status = launch_dq<Element, kHeadDim>(p, g, stream);
    return status;
  });
}

}  // namespace jfa::sm80
