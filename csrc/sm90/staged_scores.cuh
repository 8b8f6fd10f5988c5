// A bias or a mask that TMA brings: what forward and backward share of it.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "sm90/ptx.cuh"
#include "sm90/shared_matrix.cuh"
#include "sm90/tensor_map.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// In place of what is staged, in pictures of shared memory that have none.
struct NoScores {};

// Host: says in the arguments of a kernel what is staged, if its tile stages scores and the call has some: in boxes of
// `rows` queries, of a bias 64 keys, of a mask `keys` of them.
template <class Shape, class Arguments>
Status stage_scores(Arguments& a, const Problem& p, int rows, int keys) {
  a.staged = Shape::kStagesScores ? staged_scores(p) : StagedScores::kNothing;
  a.staged_row_mask = staged_row_mask(p);
  if (a.staged == StagedScores::kNothing) return Status::Ok();
  const bool is_mask = a.staged == StagedScores::kMask;
  const ScoreTensor& t = is_mask ? p.scores.mask : p.scores.bias;
  const int64_t plane = int64_t(t.q_len) * t.k_len;
  const Tensor planes = {t.data, t.heads * plane, t.k_len, plane};
  return make_tensor_map(a.scores, planes, t.type, t.k_len, t.q_len, t.heads, t.batch, t.q_len > 1 ? rows : 1,
                         is_mask ? keys : kRowBytes);
}

// Loads a tile, whose types are those of a kernel's picture of shared memory, and announces it to the
// mbarrier. Head and batch entry are those of the scores. One lane calls it.
template <class Smem, class Arguments>
__device__ __forceinline__ void load_staged_tile(const Arguments& a, uint32_t to, uint32_t full, int key, int row,
                                                 int head, int batch) {
  using Bias = typename Smem::StagedBias;
  using Mask = typename Smem::StagedMask;
  const bool is_mask = a.staged == StagedScores::kMask;
  const ScoreTensor& tensor = is_mask ? a.p.scores.mask : a.p.scores.bias;
  const int bytes = is_mask ? Mask::kBytes : Bias::kBytes;
  const int h = tensor.heads > 1 ? head : 0, b = tensor.batch > 1 ? batch : 0, i = row & a.staged_row_mask;
  mbarrier_arrive_expect(full, a.staged_row_mask != 0 ? bytes : bytes / Bias::kRows);
  if (is_mask) {
    tma_load(to, a.scores, full, key, i, h, b);
    return;
  }
#pragma unroll
  for (int c = 0; c < Bias::kChunks; ++c) {
    tma_load(to + c * Bias::kChunkBytes, a.scores, full, key + c * kChunkCols, i, h, b);
  }
}

// What a warp reads of a tile at `bytes`, its 16 keys: ScoreRule adds the bias, or hides by the mask. For those whose
// fragments are transposed, with keys as rows. kAhead: a bias is read ahead too. The tile may be given back after a
// fence, or settle().
template <class Element, class Smem, bool kAhead = false>
class TransposedStagedReader {
 public:
  // Call it while the product runs that makes the scores: all of a mask fits a register.
  template <class Arguments>
  __device__ __forceinline__ TransposedStagedReader(const Arguments& a, uint32_t bytes)
      : bytes_(bytes), row_mask_(a.staged_row_mask), adds_(a.staged == StagedScores::kBias) {
    if (adds_) {
#pragma unroll
      for (int n = 0; kAhead && n < kBlocks / 2; ++n) load_pairs(2 * n, pairs_[n]);
      return;
    }
    // A lane gets of each 8 queries, of rows 2t and 2t + 1 the keys 2g and 2g + 1, with g = lane / 4 and t = lane % 4.
    // The bytes of block n of 8 queries become bits n of one word: a bool is 0 or 1.
    uint32_t visible = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 4) {
      uint32_t pairs[4];
      load_matrix_x4_transposed(
          pairs, bytes_ + Smem::StagedMask::offset_bytes((block * 8 + lane_index()) & row_mask_, warp_index() - 4));
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
  __device__ __forceinline__ void add(Fragment<2, kCols>& s) {
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      uint32_t (&pairs)[4] = pairs_[kAhead ? block / 2 : 0];
      if (!kAhead) load_pairs(block, pairs);
      visible_ ^= pairs[0];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 pair = unpack<Element>(pairs[n]);
        float* x = &s.v[n % 2][2 * (block + n / 2)];
        x[0] = fmaf(kLog2e, pair.x, x[0]);
        x[1] = fmaf(kLog2e, pair.y, x[1]);
      }
    }
  }

  // Waits until all is read.
  __device__ __forceinline__ void settle() const { settle_loads(visible_); }

 private:
  static constexpr int kBlocks = Smem::StagedBias::kRows / 8;
  static_assert(kBlocks <= 8 && kBlocks % 4 == 0, "a byte has a bit for each block of 8 queries");

  // Of queries: keys g and g + 8 of this block of 8, then of the next.
  __device__ __forceinline__ void load_pairs(int block, uint32_t (&pairs)[4]) const {
    load_matrix_x4_transposed(pairs, bytes_ + Smem::StagedBias::offset_bytes(
                                                  (block * 8 + lane_index() / 16 * 8 + lane_index() % 8) & row_mask_,
                                                  2 * (warp_index() - 4) + lane_index() / 8 % 2));
  }

  uint32_t bytes_;
  const int& row_mask_;
  uint32_t pairs_[kAhead ? kBlocks / 2 : 1][4];  // of a bias
  bool adds_, hides_ = false;
  // Of a mask: of row r and column c, bit c / 2 of byte 2 r + c % 2. Of a bias: made of a register of each load.
  uint32_t visible_ = 0;
};

// Stands for a StagedReader in kernels to which TMA brings neither.
struct NothingStaged {
  template <class... Arguments>
  __device__ __forceinline__ explicit NothingStaged(const Arguments&...) {}
  __device__ __forceinline__ static constexpr bool adds() { return false; }
  __device__ __forceinline__ static constexpr bool hides() { return false; }
  __device__ __forceinline__ static void load_ahead() {}
  template <int kCols>
  __device__ __forceinline__ static void add(Fragment<2, kCols>&) {}
  template <int kCols>
  __device__ __forceinline__ static void hide(Fragment<2, kCols>&) {}
};

}  // namespace jfa::sm90
