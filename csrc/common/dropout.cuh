// Dropout: some probabilities become 0, the others are multiplied by 1 / (1 - rate). Which: the definition is
// jax_flashattn/_dropout.py. Philox2x32 with 7 rounds, keyed by batch entry and head, counts blocks of 16 queries and
// 32 keys, and gives a byte each to (i, j), (i + 8, j), (i, j + 8), (i + 8, j + 8) and to the same 16 keys further on.
// Fragments begin at multiples of 16, and those whose width is a multiple of 32 keys at multiples of that: see
// key_alignment() and first_of_block(). Then one thread holds all eight of these scores; four in a transposed fragment.
#pragma once

#include "common/fragment.cuh"
#include "problem.h"

namespace jfa {

__device__ __forceinline__ bool has_dropout(const Scores& scores) { return scores.dropout.seeds != nullptr; }

// Whether the kernel of a tile drops: some always do, and some may.
template <class Shape>
__device__ __forceinline__ bool drops(const Scores& scores) {
  return Shape::kDrops || (Shape::kMayDrop && has_dropout(scores));
}

// Where tiles have to begin so that query row x is in the first one.
__device__ __forceinline__ int first_of_block(const Scores& scores, int x) {
  return has_dropout(scores) ? x / 16 * 16 : x;
}

// The random bits of one batch entry and head. All lanes take part in making them.
class DropoutBits {
 public:
  __device__ __forceinline__ DropoutBits(const Problem& p, int b, int h) : DropoutBits(p, seeds_of(p, b, h)) {}
  __device__ __forceinline__ DropoutBits(const Problem& p, uint2 seeds) {
    key_ = broadcast(seeds.x);
    tweak_ = broadcast(seeds.y);
    const uint32_t whole = p.scores.dropout.steps >> 8;
    fraction_ = p.scores.dropout.steps << 24;
    below_half_ = whole < 128 ? ~0u : 0u;
    term_ = ((whole < 128 ? 128 : 256) - whole) * kOneInEachByte;
  }

  // For those who would not wait where they ask for them.
  __device__ __forceinline__ static uint2 seeds_of(const Problem& p, int b, int h) {
    return load_global(reinterpret_cast<const uint2*>(p.scores.dropout.seeds) + int64_t(b) * p.shape.heads + h);
  }

  // Dropped probabilities become 0.
  template <int kRows, int kCols>
  __device__ __forceinline__ void drop(Fragment<kRows, kCols>& p, const Position<>& at) const {
    visit<false, kRows, kCols>(at, [&](int r, int c, uint32_t kept) {
      change<false>(p, r, c, kept, [](uint32_t x, uint32_t mask) { return x & mask; });
    });
  }

  // They become negative: the backward needs to know them. -0 stays what it is: see probabilities_of_rows().
  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ void mark(Fragment<kRows, kCols>& p, const Position<>& at) const {
    visit<kTransposed, kRows, kCols>(at, [&](int r, int c, uint32_t kept) {
      change<kTransposed>(p, r, c, kept, [](uint32_t x, uint32_t mask) { return x | (~mask & 0x80000000); });
    });
  }

  // What drop_packed() is to drop of a fragment of two rows.
  template <int kCols>
  __device__ __forceinline__ void choose(uint32_t (&kept)[kCols / 4][2], const Position<>& at) const {
    visit<false, 2, kCols>(at, [&](int, int c, uint32_t word) { kept[c / 4][c % 2] = word; });
  }

 private:
  static constexpr uint32_t kOneInEachByte = 0x01010101;

  uint32_t key_, tweak_;
  // Dropped is whose byte is below the rate in units of 2^-8: a whole number, and 1 more where what eight scores share
  // is below its fraction.
  uint32_t fraction_;    // in units of 2^-32
  uint32_t term_;        // in each byte 128 or 256 minus the whole number
  uint32_t below_half_;  // all bits, if that is 128

  // Calls use(r, c, kept) for each four elements (r, c), (r + 1, c), (r, c + 2), (r + 1, c + 2): of bytes 0 to 3 of
  // `kept`, or 0, 2, 1 and 3 where fragments are transposed, the highest bit says whether the element is kept.
  template <bool kTransposed, int kRows, int kCols, class Use>
  __device__ __forceinline__ void visit(const Position<>& at, const Use& use) const {
    const int row = kTransposed ? at.first_col : at.first_row, key = kTransposed ? at.first_row : at.first_col;
#pragma unroll
    for (int r = 0; r < kRows; r += 2) {
#pragma unroll
      for (int c = 0; c < kCols; c += c % 2 == 0 ? 1 : 3) {
        if constexpr (!kTransposed && kCols % 8 == 0) {
          if (c % 8 >= 4) continue;
          const uint2 words = philox(counter_of_row(row) + r * 4, (counter_of_key(key) + c / 8 * 8 + c % 2) ^ tweak_);
          const uint32_t term = term_of(words);
          use(r, c, kept(words.x, term));
          use(r, c + 4, kept(words.y, term));
        } else {
          const int first_key = key + (kTransposed ? r * 8 : c / 4 * 16);
          const uint32_t i = counter_of_row(row) + (kTransposed ? c / 4 * 8 + c % 2 : r * 4);
          const uint2 words = philox(i, (counter_of_key(first_key) + (kTransposed ? 0 : c % 2)) ^ tweak_);
          use(r, c, kept(first_key % 32 < 16 ? words.x : words.y, term_of(words)));
        }
      }
    }
  }

  template <bool kTransposed, int kRows, int kCols, class Change>
  __device__ __forceinline__ static void change(Fragment<kRows, kCols>& p, int r, int c, uint32_t kept,
                                                const Change& with) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float& x = kTransposed ? p.v[r + n / 2][c + n % 2 * 2] : p.v[r + n % 2][c + n / 2 * 2];
      x = float_of(with(bits_of(x), spread_signs(kept, kept, n * 0x1111)));
    }
  }

  // Scores that share random bits have the same counters.
  __device__ __forceinline__ static uint32_t counter_of_row(int i) { return uint32_t(i) / 16 * 8 + uint32_t(i) % 8; }
  __device__ __forceinline__ static uint32_t counter_of_key(int j) { return uint32_t(j) / 32 * 8 + uint32_t(j) % 8; }

  // What eight scores share, as kept() wants it.
  __device__ __forceinline__ uint32_t term_of(const uint2& words) const {
    return words.x * 0x9E3779B9 + words.y < fraction_ ? term_ - kOneInEachByte : term_;
  }

  // The highest bit of each byte x becomes x >= t, given 128 - t or 256 - t: the sum of that and the lower seven bits
  // carries into it. Whether x has it too is needed, or suffices.
  __device__ __forceinline__ uint32_t kept(uint32_t word, uint32_t term) const {
    const uint32_t sum = (word & 0x7F7F7F7F) + term;
    return (word & sum) | ((word | sum) & below_half_);
  }

  __device__ __forceinline__ uint2 philox(uint32_t row, uint32_t column) const {
    constexpr uint32_t kMultiplier = 0xD256D193, kKeyStep = 0x9E3779B9;
    uint2 x{row, column};
    uint32_t round_key = key_;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t product = uint64_t(kMultiplier) * x.x;
      x = {uint32_t(product >> 32) ^ round_key ^ x.y, uint32_t(product)};
      round_key += kKeyStep;
    }
    return x;
  }
};

// Drops of probabilities that are packed already, operand A of a product, what choose() has chosen.
template <int kBlocks>
__device__ __forceinline__ void drop_packed(uint32_t (&p)[kBlocks][4], const uint32_t (&kept)[kBlocks][2]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int n = 0; n < 4; ++n) p[block][n] &= spread_signs(kept[block][0], kept[block][1], 0x4400 + n * 0x1111);
  }
}

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
