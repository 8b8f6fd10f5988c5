// Host side of the portable forward.
#pragma once

#include "common/visibility.cuh"
#include "dispatch.h"
#include "sm80/family.h"
#include "sm80/forward.cuh"

namespace jfa::sm80 {

template <int kHeadDim>
Status launch_forward(const Problem& p, cudaStream_t stream) {
  using Shape = ForwardTile<kHeadDim>;
  using Smem = ForwardSmem<kHeadDim>;
  static_assert(sizeof(Smem) == Shape::kSharedBytes, "tiles.h and the kernel disagree");
  static_assert(sizeof(Smem) <= kSharedMemoryLimit, "a tile of tiles.h exceeds the shared memory of sm_86");
  const int64_t blocks = int64_t(ceil_div(p.shape.q_len, Shape::kQ)) * p.shape.heads * p.shape.batch;
  const Status status = launch_prepare_visibility<Sm80>(p, stream);
  if (!status.ok()) return status;
  return with_element(p.type, [&](auto element) {
    return with_bool(runs_general(p), [&](auto general) {
      return launch("jax_flashattn sm80 forward", forward<typename decltype(element)::type, kHeadDim, general.value>,
                    Grid{blocks, Shape::kThreads, sizeof(Smem)}, stream, p);
    });
  });
}

}  // namespace jfa::sm80
