// The bias of the Hopper forward, where TMA can copy it: a warp of its own loads, for each warpgroup that computes,
// that one's tile of 64 rows; it is read while products become scores, and given back at once.
#pragma once

#include "sm90/forward_work.cuh"

namespace jfa::sm90 {

// The role of the warp that loads the bias, along all items.
template <class Shape>
__device__ __forceinline__ void load_bias(const ForwardArguments& a, ForwardSmem<Shape>& smem) {
  using Bias = typename ForwardSmem<Shape>::Bias;
  const ScoreTensor& bias = a.p.scores.bias;
  uint32_t parity = 1;
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    mbarrier_wait(shared_address(&smem.item_ready), taken % 2);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken));
    if (item.first_row < 0) break;
    arrive_for_lane(shared_address(&smem.q_free));  // the item has been read
    const int head = bias.heads > 1 ? item.head : 0, batch = bias.batch > 1 ? item.batch : 0;
    int j = first_tile(item);
#pragma unroll 1
    for (int t = 0; t < item.key_tiles; ++t, j = next_tile<Shape>(item, j)) {
#pragma unroll 1
      for (int w = 0; w < Shape::kWarpgroups; ++w) {
        mbarrier_wait(shared_address(&smem.bias_free[w]), parity);
        if (!elect_one()) continue;
        const uint32_t full = shared_address(&smem.bias_full[w]), to = shared_address(smem.staged.bias[w].bytes);
        mbarrier_arrive_expect(full, Bias::kBytes);
#pragma unroll
        for (int c = 0; c < Bias::kChunks; ++c) {
          tma_load(to + c * Bias::kChunkBytes, a.bias, full, j + c * kChunkCols, item.first_row + w * kWarpgroupRows,
                   head, batch);
        }
      }
      parity ^= 1;
    }
  }
}

// The current tile of the bias, of this warp's 16 rows; ScoreRule adds it.
template <class Element, class Shape>
struct StagedBias {
  using Bias = typename ForwardSmem<Shape>::Bias;
  const ForwardArguments& a;
  const ForwardSmem<Shape>& smem;
  uint32_t& parity;  // of the next one

  __device__ __forceinline__ bool present() const { return a.has_bias; }

  template <int kCols>
  __device__ __forceinline__ void add(Fragment<2, kCols>& s) const {
    const int warpgroup = warp_index() / 4 - 1;
    mbarrier_wait(shared_address(&smem.bias_full[warpgroup]), parity);
    parity ^= 1;
    const uint32_t place = shared_address(smem.staged.bias[warpgroup].bytes);
    const int row = warp_index() % 4 * 16 + lane_index() % 16;
    uint32_t loaded = 0;
#pragma unroll
    for (int block = 0; block < kCols / 4; ++block) {
      uint32_t pairs[4];
      load_matrix_x4(pairs, place + Bias::offset_bytes(row, 2 * block + lane_index() / 16));
      loaded ^= pairs[0];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 pair = unpack<Element>(pairs[n]);
        float* x = &s.v[n % 2][4 * block + n / 2 * 2];
        x[0] = fmaf(kLog2e, pair.x, x[0]);
        x[1] = fmaf(kLog2e, pair.y, x[1]);
      }
    }
    settle_loads(loaded);
    arrive_for_warp(shared_address(&smem.bias_free[warpgroup]));
  }
};

struct NoBias {
  __device__ __forceinline__ static constexpr bool present() { return false; }
  template <int kCols>
  __device__ __forceinline__ static void add(Fragment<2, kCols>&) {}
};

}  // namespace jfa::sm90
