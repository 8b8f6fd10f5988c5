// A bias or a mask, from memory to the scores of a fragment.
//
// A thread reads in rounds of kWords words, and uses up one round before the next: kWords columns, from `first` on, of
// two rows of elements of at most two bytes, which lie side by side in pairs, or of one row of anything else. A family
// may load the first round ahead, while the products run that make the scores.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"

namespace jfa {

template <int kWords>
struct ScoreWords {
  uint32_t v[kWords];
};

// What belongs to one batch entry and head. Transposed: the fragment's rows are keys, its columns queries.
template <bool kTransposed>
struct ScoreReader {
  const unsigned char* data;
  int64_t row_stride, col_stride;
  ElementType type;
  bool in_pairs;  // rows are even in length and in their beginnings: no pair of neighbours crosses an end

  __device__ __forceinline__ ScoreReader(const ScoreTensor& tensor, int b, int h, const Position<>& at)
      : row_stride(kTransposed ? tensor.k_stride : tensor.q_stride),
        col_stride(kTransposed ? tensor.q_stride : tensor.k_stride),
        type(tensor.type) {
    const int bytes = type == ElementType::kFloat ? 4 : type == ElementType::kBool ? 1 : 2;
    data = static_cast<const unsigned char*>(tensor.data) + (b * tensor.batch_stride + h * tensor.head_stride) * bytes;
    in_pairs = !kTransposed && col_stride == 1 && tensor.k_len % 2 == 0 && row_stride % 2 == 0 &&
               at.first_col % 2 == 0 && reinterpret_cast<uintptr_t>(data) % (2 * bytes) == 0;
  }

  // Whether a round has two rows.
  __device__ __forceinline__ bool two_rows() const { return in_pairs && type != ElementType::kFloat; }

  // Loads the round that begins with row r, where the rows see anything of it: `whole` where they see all.
  template <int kWords>
  __device__ __forceinline__ void load(ScoreWords<kWords>& words, int r, int first, const Position<>& at,
                                       const Sequence& sequence, bool whole) const {
    if (two_rows()) {
      if (type == ElementType::kBool) {
        load_pairs<uint16_t, false>(words, r, first, at, sequence);
      } else if (whole) {
        load_pairs<uint32_t, true>(words, r, first, at, sequence);
      } else {
        load_pairs<uint32_t, false>(words, r, first, at, sequence);
      }
    } else if (type == ElementType::kFloat) {
      load_row<uint32_t>(words, r, first, at, sequence);
    } else if (type == ElementType::kBool) {
      load_row<uint8_t>(words, r, first, at, sequence);
    } else {
      load_row<uint16_t>(words, r, first, at, sequence);
    }
  }

  // Calls combine(score, element) for the scores of a round, with 1 or 0 for what is bool.
  template <int kRows, int kCols, int kWords, class Combine>
  __device__ __forceinline__ void use(Fragment<kRows, kCols>& s, const ScoreWords<kWords>& words, int r, int first,
                                      const Combine& combine) const {
    if (two_rows()) {
      if (type == ElementType::kBool) {
        use_pairs(s, words, r, first, combine,
                  [](uint32_t pair) { return float2{(pair & 0xff) != 0 ? 1.0f : 0.0f, pair >> 8 != 0 ? 1.0f : 0.0f}; });
      } else if (type == ElementType::kHalf) {
        use_pairs(s, words, r, first, combine, [](uint32_t pair) { return unpack<__half>(pair); });
      } else {
        use_pairs(s, words, r, first, combine, [](uint32_t pair) { return unpack<__nv_bfloat16>(pair); });
      }
    } else if (type == ElementType::kFloat) {
      use_row(s, words, r, first, combine, [](uint32_t word) { return float_of(word); });
    } else if (type == ElementType::kBool) {
      use_row(s, words, r, first, combine, [](uint32_t word) { return word != 0 ? 1.0f : 0.0f; });
    } else if (type == ElementType::kHalf) {
      use_row(s, words, r, first, combine, [](uint32_t word) { return unpack<__half>(word).x; });
    } else {
      use_row(s, words, r, first, combine, [](uint32_t word) { return unpack<__nv_bfloat16>(word).x; });
    }
  }

 private:
  // What a row sees, counted from the thread's first column: what is compared with them are then constants.
  __device__ __forceinline__ static Interval columns(int row, const Position<>& at, const Sequence& sequence) {
    Interval visible = kTransposed ? sequence.rows(row) : sequence.keys(row);
    if (!kTransposed && sequence.sink_keys() > 0) visible.begin = 0;
    return {visible.begin - at.first_col, visible.end - at.first_col};
  }
  template <class Pair, bool kWhole, int kWords>
  __device__ __forceinline__ void load_pairs(ScoreWords<kWords>& words, int first_r, int first, const Position<>& at,
                                             const Sequence& sequence) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = opaque(at.row(first_r + r));
      const Interval cols = columns(i, at, sequence);
      const Pair* row = reinterpret_cast<const Pair*>(data + (i * row_stride + at.first_col) * (sizeof(Pair) / 2));
#pragma unroll
      for (int n = 0; n < kWords / 2; ++n) {
        const int col = Position<>::col_offset(first + 2 * n);
        words.v[r * (kWords / 2) + n] =
            kWhole || (col < cols.end && col + 1 >= cols.begin) ? load_global(row + col / 2) : 0;
      }
    }
  }
  template <class Word, int kWords>
  __device__ __forceinline__ void load_row(ScoreWords<kWords>& words, int r, int first, const Position<>& at,
                                           const Sequence& sequence) const {
    const int i = opaque(at.row(r));
    const Interval cols = columns(i, at, sequence);
    const Word* row = reinterpret_cast<const Word*>(data) + i * row_stride + at.first_col * col_stride;
#pragma unroll
    for (int c = 0; c < kWords; ++c) {
      const int col = Position<>::col_offset(first + c);
      words.v[c] = cols.contains(col) ? load_global(row + col * col_stride) : 0;
    }
  }
  template <int kRows, int kCols, int kWords, class Combine, class Unpack>
  __device__ __forceinline__ static void use_pairs(Fragment<kRows, kCols>& s, const ScoreWords<kWords>& words,
                                                   int first_r, int first, const Combine& combine,
                                                   const Unpack& unpack) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < kWords / 2; ++n) {
        const float2 pair = unpack(words.v[r * (kWords / 2) + n]);
        float (&row)[kCols] = s.v[first_r + r];
        row[first + 2 * n] = combine(row[first + 2 * n], pair.x);
        row[first + 2 * n + 1] = combine(row[first + 2 * n + 1], pair.y);
      }
    }
  }
  template <int kRows, int kCols, int kWords, class Combine, class Unpack>
  __device__ __forceinline__ static void use_row(Fragment<kRows, kCols>& s, const ScoreWords<kWords>& words, int r,
                                                 int first, const Combine& combine, const Unpack& unpack) {
#pragma unroll
    for (int c = 0; c < kWords; ++c) s.v[r][first + c] = combine(s.v[r][first + c], unpack(words.v[c]));
  }
};

}  // namespace jfa
