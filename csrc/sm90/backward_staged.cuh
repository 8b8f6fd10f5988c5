// A bias or a mask of the Hopper backward that owns keys, where TMA can copy it: a warp of its own loads the part that
// belongs to a tile of queries and the block's keys, into a place beside that tile's. All keys of the block share it.
#pragma once

#include "sm90/backward_work.cuh"
#include "sm90/staged_scores.cuh"

namespace jfa::sm90 {

// The role of the warp that loads them, along all items.
template <class Shape>
__device__ __forceinline__ void load_staged(const BackwardArguments& a, BackwardSmem<Shape>& smem) {
  const int group = a.p.shape.heads / a.p.shape.kv_heads;
  RingPosition<Shape::kStages> at(1);
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const BackwardItem item = wait_for_item(smem, taken);
    if (item.first_key < 0) break;
#pragma unroll 1
    for (int h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h) {
#pragma unroll 1
      for (int tile = 0; tile < item.q_tiles; ++tile, at.advance()) {
        mbarrier_wait(shared_address(&smem.stage_free[at.slot]), at.parity);
        if (!elect_one()) continue;
        load_staged_tile<BackwardSmem<Shape>>(a, shared_address(smem.staged.scores[at.slot].bytes),
                                              shared_address(&smem.staged_full[at.slot]), item.first_key,
                                              item.from_row + tile * row_step<Shape>(a.g), h, item.batch);
      }
    }
    leave_item(smem, taken);
  }
}

}  // namespace jfa::sm90
