// Dropout: some probabilities become 0, the others are multiplied by 1 / (1 - rate). Which: the definition is
// jax_flashattn/_dropout.py. Philox2x32 with 7 rounds, keyed by batch entry and head, counts blocks of 16 x 16 of
// (query row, key), and gives 16 bits each to (i, j), (i, j + 8), (i + 8, j) and (i + 8, j + 8). One thread holds these
// four, of a fragment and of its transposed, where fragments begin at multiples of 16: see key_alignment() and
// first_of_block().
#pragma once

#include "common/fragment.cuh"
#include "problem.h"

namespace jfa {

__device__ __forceinline__ bool has_dropout(const Scores& scores) { return scores.dropout.seeds != nullptr; }

// Where tiles have to begin so that query row x is in the first one.
__device__ __forceinline__ int first_of_block(const Scores& scores, int x) {
  return has_dropout(scores) ? x / 16 * 16 : x;
}

// The random bits of one batch entry and head.
struct DropoutBits {
  uint32_t key, tweak;
  uint32_t steps;  // as many of 2^16 are dropped

  __device__ __forceinline__ DropoutBits(const Problem& p, int b, int h) : steps(p.scores.dropout.steps) {
    const uint32_t* seeds = p.scores.dropout.seeds + (int64_t(b) * p.shape.heads + h) * 2;
    key = load_global(seeds);
    tweak = load_global(seeds + 1);
  }

  // Dropped probabilities become 0.
  template <int kRows, int kCols>
  __device__ __forceinline__ void drop(Fragment<kRows, kCols>& p, const Position<>& at) const {
    visit<false>(p, at, [](float& x, bool dropped) { x = dropped ? 0.0f : x; });
  }

  // They become negative: the backward needs to know them. -0 stays what it is: see probabilities_of_rows().
  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ void mark(Fragment<kRows, kCols>& p, const Position<>& at) const {
    visit<kTransposed>(p, at, [](float& x, bool dropped) { x = dropped ? -fabsf(x) : x; });
  }

 private:
  template <bool kTransposed, int kRows, int kCols, class Use>
  __device__ __forceinline__ void visit(Fragment<kRows, kCols>& p, const Position<>& at, const Use& use) const {
    const uint32_t row = counter(at.first_row), col = counter(at.first_col);
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
#pragma unroll
      for (int n = 0; n < kCols / 2; ++n) {
        const int c = n / 2 * 4 + n % 2;
        const uint32_t row_counter = row + r * 4, col_counter = col + n / 2 * 8 + n % 2;
        const uint2 words = kTransposed ? philox(col_counter, row_counter) : philox(row_counter, col_counter);
        use(p.v[r][c], is_dropped(words.x, 0));
        use(kTransposed ? p.v[r + 1][c] : p.v[r][c + 2], is_dropped(words.x, 1));
        use(kTransposed ? p.v[r][c + 2] : p.v[r + 1][c], is_dropped(words.y, 0));
        use(p.v[r + 1][c + 2], is_dropped(words.y, 1));
      }
    }
  }

  // Of the lower or the upper half of a word.
  __device__ __forceinline__ bool is_dropped(uint32_t word, int half) const {
    return (half == 0 ? word << 16 : word) < steps << 16;
  }

  // Of a row or a key in the first half of its block of 16.
  __device__ __forceinline__ static uint32_t counter(int x) { return uint32_t(x) / 16 * 8 + uint32_t(x) % 8; }

  __device__ __forceinline__ uint2 philox(uint32_t row, uint32_t column) const {
    constexpr uint32_t kMultiplier = 0xD256D193, kKeyStep = 0x9E3779B9;
    uint2 x{row, column ^ tweak};
    uint32_t round_key = key;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t product = uint64_t(kMultiplier) * x.x;
      x = {uint32_t(product >> 32) ^ round_key ^ x.y, uint32_t(product)};
      round_key += kKeyStep;
    }
    return x;
  }
};

// dP of marked probabilities `p`.
template <int kRows, int kCols>
__device__ __forceinline__ void drop_gradients(Fragment<kRows, kCols>& dp, const Fragment<kRows, kCols>& p,
                                               float kept) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) dp.v[r][c] = p.v[r][c] < 0.0f ? 0.0f : dp.v[r][c] * kept;
  }
}

// Marked probabilities as they multiply values.
template <int kRows, int kCols>
__device__ __forceinline__ void clear_marked(Fragment<kRows, kCols>& p) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) p.v[r][c] = p.v[r][c] < 0.0f ? 0.0f : p.v[r][c];
  }
}

}  // namespace jfa
