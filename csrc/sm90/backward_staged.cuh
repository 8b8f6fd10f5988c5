// A bias or a mask of the Hopper backward that owns keys, where TMA can copy it: a warp of its own loads the part that
// belongs to a tile of queries and the block's keys, into a place beside that tile's. All keys of the block share it.
#pragma once

#include "sm90/backward_work.cuh"
#include "sm90/staged_scores.cuh"

namespace jfa::sm90 {

// The role of the warp that loads them, along all items.
template <class Shape>
__device__ __forceinline__ void load_staged(const BackwardArguments& a, BackwardSmem<Shape>& smem) {
  using Bias = typename BackwardSmem<Shape>::StagedBias;
  using Mask = typename BackwardSmem<Shape>::StagedMask;
  const bool is_mask = a.staged == StagedScores::kMask;
  const ScoreTensor& tensor = is_mask ? a.p.scores.mask : a.p.scores.bias;
  const int group = a.p.shape.heads / a.p.shape.kv_heads;
  RingPosition<Shape::kStages> at(1);
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const BackwardItem item = wait_for_item(smem, taken);
    if (item.first_key < 0) break;
    const int batch = tensor.batch > 1 ? item.batch : 0;
#pragma unroll 1
    for (int h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h) {
#pragma unroll 1
      for (int tile = 0; tile < item.q_tiles; ++tile, at.advance()) {
        mbarrier_wait(shared_address(&smem.stage_free[at.slot]), at.parity);
        if (!elect_one()) continue;
        const uint32_t to = shared_address(smem.staged.scores[at.slot].bytes);
        const uint32_t full = shared_address(&smem.staged_full[at.slot]);
        const int row = item.first_row + tile * Shape::kQ, head = tensor.heads > 1 ? h : 0;
        if (is_mask) {
          mbarrier_arrive_expect(full, Mask::kBytes);
          tma_load(to, a.scores, full, item.first_key, row, head, batch);
        } else {
          mbarrier_arrive_expect(full, Bias::kBytes);
#pragma unroll
          for (int c = 0; c < Bias::kChunks; ++c) {
            tma_load(to + c * Bias::kChunkBytes, a.scores, full, item.first_key + c * kChunkCols, row, head, batch);
          }
        }
      }
    }
    leave_item(smem, taken);
  }
}

// What a warp reads of them, 16 keys of the tile of queries in place `slot`: ScoreRule adds the bias, or hides by the
// mask. Fragments are transposed: their rows are keys.
template <class Element, class Shape>
class TransposedStagedReader {
 public:
  // Waits for the tile. Call it while the product runs that makes the scores: all of a mask fits a register.
  __device__ __forceinline__ TransposedStagedReader(const BackwardArguments& a, const BackwardSmem<Shape>& smem,
                                                    int slot, uint32_t parity)
      : bytes_(shared_address(smem.staged.scores[slot].bytes)), adds_(a.staged == StagedScores::kBias) {
    mbarrier_wait(shared_address(&smem.staged_full[slot]), parity);
    if (adds_) return;
    // A lane gets of each 8 queries, of rows 2t and 2t + 1 the keys 2g and 2g + 1, with g = lane / 4 and t = lane % 4.
    // The bytes of block n of 8 queries become bits n of one word: a bool is 0 or 1.
    uint32_t visible = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 4) {
      uint32_t pairs[4];
      load_matrix_x4_transposed(
          pairs, bytes_ + BackwardSmem<Shape>::StagedMask::offset_bytes(block * 8 + lane_index(), warp_index() - 4));
#pragma unroll
      for (int n = 0; n < 4; ++n) visible += pairs[n] << (block + n);
    }
    hides_ = any_lane(visible != 0x01010101u * ((1u << kBlocks) - 1));
    // The fragment has keys g and g + 8: two lanes with the same queries have them, among others.
    const int source = lane_index() / 8 * 4 + lane_index() % 4;
    const uint32_t first = shuffle_from(visible, source), second = shuffle_from(visible, source + 16);
    visible_ = select_bytes(first, second, lane_index() / 4 % 2 == 0 ? 0x6420 : 0x7531);
  }

  __device__ __forceinline__ bool adds() const { return adds_; }
  __device__ __forceinline__ bool hides() const { return hides_; }

  template <int kCols>
  __device__ __forceinline__ void hide(Fragment<2, kCols>& s) const {
    // In the order of the bits: seven become predicates by one instruction.
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float& x = s.v[n / 2][2 * block + n % 2];
        x = (visible_ & 1u << (8 * n + block)) != 0 ? x : minus_infinity();
      }
    }
  }

  template <int kCols>
  __device__ __forceinline__ void add(Fragment<2, kCols>& s) const {
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      uint32_t pairs[4];  // of queries: keys g and g + 8 of this block, then of the next
      load_matrix_x4_transposed(pairs, bytes_ + BackwardSmem<Shape>::StagedBias::offset_bytes(
                                                    block * 8 + lane_index() / 16 * 8 + lane_index() % 8,
                                                    2 * (warp_index() - 4) + lane_index() / 8 % 2));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 pair = unpack<Element>(pairs[n]);
        float* x = &s.v[n % 2][2 * (block + n / 2)];
        x[0] = fmaf(kLog2e, pair.x, x[0]);
        x[1] = fmaf(kLog2e, pair.y, x[1]);
      }
    }
  }

 private:
  static constexpr int kBlocks = Shape::kQ / 8;
  static_assert(kBlocks == 8, "a byte has a bit for each block of 8 queries");

  uint32_t bytes_;
  bool adds_, hides_ = false;
  uint32_t visible_;  // of row r and column c, bit c / 2 of byte 2 r + c % 2
};

}  // namespace jfa::sm90
