// From products q.k to masked scores. Two forms, chosen at compile time:
//   plain    scores stay raw products; the scale is folded into the exponent: p = 2^(s factor - m factor)
//   general  s = (cap(scale q.k) + bias - slope |distance|) log2(e), with cap(x) = c tanh(x / c), and factor is 1;
//            where nothing is added, the last multiplication is left to the exponent, as in the plain form
// Masks are selects of -inf and come last, so nothing that is masked, NaN included, survives.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/score_tensor.cuh"
#include "common/sequence.cuh"

namespace jfa {

// Derivatives of the soft cap at a fragment's scores, which their gradients are multiplied by. In half precision: two
// share a register, and gradients are rounded to 16 bits as well.
template <int kRows, int kCols>
struct CapSlopes {
  uint32_t v[kRows][kCols / 2];

  // Of columns c and c + 1, given tanh. Never NaN, so that what a mask makes 0 stays 0.
  __device__ __forceinline__ void keep(int r, int c, float tanh, float next) {
    v[r][c / 2] = pack<__half>(one_minus_square(tanh), one_minus_square(next));
  }
  __device__ __forceinline__ float2 at(int r, int c) const { return unpack<__half>(v[r][c / 2]); }

  __device__ __forceinline__ void multiply_into(Fragment<kRows, kCols>& ds) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; c += 2) {
        const float2 slope = at(r, c);
        ds.v[r][c] *= slope.x;
        ds.v[r][c + 1] *= slope.y;
      }
    }
  }
};
// For those who do not want them.
struct NoSlopes {
  __device__ __forceinline__ void keep(int, int, float, float) {}
  template <int kRows, int kCols>
  __device__ __forceinline__ void multiply_into(Fragment<kRows, kCols>&) const {}
};

// What the rows of a fragment see of the keys: looked up for each tile,
struct RowsLookedUp {
  const Sequence& sequence;
  Position<> at;
  __device__ __forceinline__ Interval keys(int r) const { return sequence.keys(opaque(at.row(r))); }
  __device__ __forceinline__ int offset(int r) const { return sequence.offset_of_row(at.row(r)); }
};
// or kept from tile to tile.
template <int kRows>
struct RowsKept {
  RowSight v[kRows];
  __device__ __forceinline__ const Interval& keys(int r) const { return v[r].keys; }
  __device__ __forceinline__ int offset(int r) const { return v[r].offset; }
};

// The scores of one batch entry and head.
template <bool kGeneral>
struct ScoreRule {
  const Scores& scores;
  float factor_log2;     // from a score as apply() leaves it to log2 units
  float scale;           // of q.k, natural units
  float slope = 0.0f;    // of ALiBi
  float per_cap = 0.0f;  // 1 / soft cap
  int b, h;

  __device__ __forceinline__ explicit ScoreRule(const Scores& scores_) : scores(scores_) {
    factor_log2 = factor_of(scores);
    if (kGeneral && scores.soft_cap != 0.0f) per_cap = reciprocal_approximate(scores.soft_cap);
  }
  __device__ __forceinline__ ScoreRule(const Scores& scores_, int b_, int h_) : ScoreRule(scores_) { begin(b_, h_); }

  // Goes on to another batch entry and head. Nobody waits here for what is loaded.
  __device__ __forceinline__ void begin(int b_, int h_) {
    b = b_;
    h = h_;
    scale = scores.scale;
    if constexpr (kGeneral) {
      if (scores.device_scale != nullptr) scale = load_global(scores.device_scale + b * scores.device_scale_stride);
      const HeadNumbers& slopes = scores.alibi_slopes;
      if (slopes.data != nullptr) slope = load_global(slopes.data + b * slopes.batch_stride + h);
    }
  }
  __device__ __forceinline__ static float factor_of(const Scores& scores) {
    if (kGeneral && (has_terms(scores) || (scores.soft_cap == 0.0f && scores.device_scale != nullptr))) return 1.0f;
    return (kGeneral && scores.soft_cap != 0.0f ? scores.soft_cap : scores.scale) * kLog2e;
  }
  // Whether anything is added to products, so that they have to be in log2 units.
  __device__ __forceinline__ static bool has_terms(const Scores& scores) {
    return scores.bias.data != nullptr || scores.alibi_slopes.data != nullptr;
  }

  // `all` is the interval of keys that no row of the fragment masks; [begin, end) the keys of the tile.
  __device__ __forceinline__ static bool is_whole(Interval all, int begin, int end) {
    return begin >= all.begin && end <= all.end;
  }
  __device__ __forceinline__ static bool needs_mask(Interval all, int begin, int end) {
    return kGeneral || !is_whole(all, begin, end);
  }
  // Whether scores of the tile may be hidden. kReads: there may be a bias or a mask.
  template <bool kReads>
  __device__ __forceinline__ static bool may_hide(Interval all, int begin, int end) {
    return (kGeneral && kReads) || !is_whole(all, begin, end);
  }

  // The first round of what apply() will read from memory. `whole`: no row masks any key of the tile.
  template <int kCols>
  __device__ __forceinline__ void load_ahead(ScoreWords<kCols>& words, const Position<>& at, const Sequence& sequence,
                                             bool whole) const {
    const ScoreTensor& first = scores.bias.data != nullptr ? scores.bias : scores.mask;
    if (first.data != nullptr) ScoreReader<false>(first, b, h, at).load(words, 0, 0, at, sequence, whole);
  }

  // Products to scores, in place. Call it where needs_mask() holds. `hides`: what may_hide() said. Slopes are CapSlopes
  // or NoSlopes.
  template <bool kReads = true, int kRows, int kCols, class Slopes>
  __device__ __forceinline__ void apply(Fragment<kRows, kCols>& s, const Position<>& at, const Sequence& sequence,
                                        bool hides, Slopes& slopes) const {
    ScoreWords<kCols> words;
    if constexpr (kGeneral && kReads) load_ahead(words, at, sequence, false);
    const RowsLookedUp rows{sequence, at};
    compute_scores<false, kReads>(s, at, sequence, rows, false, words, slopes);
    if (hides) hide_rows(s, at, sequence, rows);
  }
  // The same with what load_ahead() has loaded.
  template <int kRows, int kCols, class Slopes>
  __device__ __forceinline__ void apply(Fragment<kRows, kCols>& s, const Position<>& at, const Sequence& sequence,
                                        bool whole, ScoreWords<kCols>& words, Slopes& slopes) const {
    const RowsLookedUp rows{sequence, at};
    compute_scores<false, true>(s, at, sequence, rows, whole, words, slopes);
    if (!whole) hide_rows(s, at, sequence, rows);
  }
  // The same where nothing is read from memory, but from tiles in shared memory: staged.add(), where staged.adds(),
  // adds a bias to scores in log2 units; staged.hide(), where staged.hides(), applies a mask. Rows are RowsLookedUp or
  // RowsKept. What the rows do not see is left to hide_rows().
  template <int kRows, int kCols, class Rows, class Slopes, class Staged>
  __device__ __forceinline__ void apply_staged(Fragment<kRows, kCols>& s, const Position<>& at, const Rows& rows,
                                               Slopes& slopes, Staged& staged) const {
    if constexpr (kGeneral) {
      scale_and_cap(s, slopes);
      if (staged.adds()) staged.add(s);
      if (scores.alibi_slopes.data != nullptr) add_alibi(s, at, rows);
      if (staged.hides()) staged.hide(s);
    }
  }
  // `see_all`: what the rows see is known to be whole intervals. Otherwise each is asked: plain tiles lose 5 % by that.
  template <int kRows, int kCols, class Rows>
  __device__ __forceinline__ static void hide_rows(Fragment<kRows, kCols>& s, const Position<>& at,
                                                   const Sequence& sequence, const Rows& rows, bool see_all = false) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      hide_outside(s, r, at, rows.keys(r), sequence.sink_keys());
      if (see_all || sequence.sees_all_keys(at.row(r))) continue;
      hide_others(s, r, at, load_global(sequence.row_segments() + at.row(r)), sequence.key_segments());
    }
  }
  // The same of S^T: rows of the fragment are keys, columns queries. may_hide() then compares intervals of queries.
  template <bool kReads, int kRows, int kCols, class Slopes>
  __device__ __forceinline__ void apply_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                   const Sequence& sequence, bool hides, Slopes& slopes) const {
    // In short rounds: nothing is loaded ahead, and the words would need registers beside the products under way.
    ScoreWords<kCols % 8 == 0 ? 8 : 4> words;
    compute_scores<true, kReads>(s, at, sequence, NoRows{}, false, words, slopes);
    if (hides) hide_transposed(s, at, sequence);
  }
  // The same with what is staged.
  template <int kRows, int kCols, class Slopes, class Staged>
  __device__ __forceinline__ void apply_staged_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                          const Sequence& sequence, bool hides, Slopes& slopes,
                                                          Staged& staged) const {
    scale_and_cap(s, slopes);
    if (staged.adds()) staged.add(s);
    if (scores.alibi_slopes.data != nullptr) add_alibi_transposed(s, at, sequence);
    if (staged.hides()) staged.hide(s);
    if (hides) hide_transposed(s, at, sequence);
  }
  template <int kRows, int kCols>
  __device__ __forceinline__ void hide_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                  const Sequence& sequence) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = opaque(at.row(r));
      hide_outside(s, r, at, sequence.rows(j), 0);
      if (!sequence.seen_by_all_rows(j)) {
        hide_others(s, r, at, load_global(sequence.key_segments() + j), sequence.row_segments());
      }
    }
  }

 private:
  struct NoRows {};

  // Keeps of one row the columns of an interval, and those below both its end and `sinks`.
  template <int kRows, int kCols>
  __device__ __forceinline__ static void hide_outside(Fragment<kRows, kCols>& s, int r, const Position<>& at,
                                                      const Interval& visible, int sinks) {
    // Relative to this thread's first column: what is compared with them are then constants.
    const int begin = visible.begin - at.first_col;
    const int end = visible.end - at.first_col;
#pragma unroll
    for (int c = 0; c < kCols; ++c) s.v[r][c] = Position<>::col_offset(c) < end ? s.v[r][c] : minus_infinity();
    if (begin <= 0) return;  // of keys, only windows have an edge there
    const int sink_end = sinks > 0 ? sinks - at.first_col : -kUnbounded;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const int col = Position<>::col_offset(c);
      s.v[r][c] = col >= begin || col < sink_end ? s.v[r][c] : minus_infinity();
    }
  }

  // Keeps of what is left of a row the columns of its segment.
  template <int kRows, int kCols>
  __device__ __forceinline__ static void hide_others(Fragment<kRows, kCols>& s, int r, const Position<>& at,
                                                     int segment, const int* segments) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      if (s.v[r][c] == minus_infinity()) continue;  // outside the tensor too
      if (load_global(segments + at.col(c)) != segment) s.v[r][c] = minus_infinity();
    }
  }

  // All but visibility. The first round of `words` has been loaded, except of what is transposed.
  template <bool kTransposed, bool kReads, int kRows, int kCols, class Rows, int kWords, class Slopes>
  __device__ __forceinline__ void compute_scores(Fragment<kRows, kCols>& s, const Position<>& at,
                                                 const Sequence& sequence, const Rows& rows, bool whole,
                                                 ScoreWords<kWords>& words, Slopes& slopes) const {
    if constexpr (kGeneral) {
      scale_and_cap(s, slopes);
      const auto combine = [&](const ScoreTensor& tensor, bool loaded, const auto& with) {
        if (!kReads || tensor.data == nullptr) return;
        const ScoreReader<kTransposed> reader(tensor, b, h, at);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r % 2 != 0 && reader.two_rows()) continue;
#pragma unroll
          for (int first = 0; first < kCols; first += kWords) {
            if (r > 0 || first > 0 || !loaded) reader.load(words, r, first, at, sequence, whole);
            reader.use(s, words, r, first, with);
          }
        }
      };
      combine(scores.bias, !kTransposed, [](float score, float element) { return fmaf(kLog2e, element, score); });
      if (scores.alibi_slopes.data != nullptr) {
        if constexpr (kTransposed) add_alibi_transposed(s, at, sequence);
        if constexpr (!kTransposed) add_alibi(s, at, rows);
      }
      combine(scores.mask, !kTransposed && scores.bias.data == nullptr,
              [](float score, float element) { return element != 0.0f ? score : minus_infinity(); });
    }
  }

  template <int kRows, int kCols, class Slopes>
  __device__ __forceinline__ void scale_and_cap(Fragment<kRows, kCols>& s, Slopes& slopes) const {
    const bool capped = scores.soft_cap != 0.0f;
    if (capped) {
      const float inward = scale * per_cap;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kCols; c += 2) {
          s.v[r][c] = tanh_approximate(multiply(s.v[r][c], inward));
          s.v[r][c + 1] = tanh_approximate(multiply(s.v[r][c + 1], inward));
          slopes.keep(r, c, s.v[r][c], s.v[r][c + 1]);
        }
      }
    }
    if (!has_terms(scores) && (capped || scores.device_scale == nullptr)) return;
    const float outward = (capped ? scores.soft_cap : scale) * kLog2e;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) s.v[r][c] = multiply(s.v[r][c], outward);
    }
  }

  // Distances are whole numbers, and exact below 2^24.
  template <int kRows, int kCols, class Rows>
  __device__ __forceinline__ void add_alibi(Fragment<kRows, kCols>& s, const Position<>& at, const Rows& rows) const {
    const float per_key = -kLog2e * slope;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float first = at.first_col - at.row(r) - rows.offset(r);
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s.v[r][c] = fmaf(per_key, fabsf(first + Position<>::col_offset(c)), s.v[r][c]);
      }
    }
  }
  template <int kRows, int kCols>
  __device__ __forceinline__ void add_alibi_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                       const Sequence& sequence) const {
    const float per_key = -kLog2e * slope;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = at.row(r);
      const float first = j - at.first_col - sequence.offset_of_key(j);
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s.v[r][c] = fmaf(per_key, fabsf(first - Position<>::col_offset(c)), s.v[r][c]);
      }
    }
  }
};

}  // namespace jfa
