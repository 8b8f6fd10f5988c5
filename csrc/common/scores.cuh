// From products q.k to masked scores. Two forms, chosen at compile time:
//   plain    scores stay raw products; the scale is folded into the exponent: p = 2^(s factor - m factor)
//   general  scores are brought to log2 units first: s = (scale q.k + bias) log2(e), and factor is 1
// Masks are selects of -inf and come last, so nothing that is masked, NaN included, survives.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/score_tensor.cuh"
#include "common/sequence.cuh"

namespace jfa {

// The scores of one batch entry and head.
template <bool kGeneral>
struct ScoreRule {
  float scale;        // of q.k, natural units
  float factor_log2;  // from a score as apply() leaves it to log2 units
  const Scores& scores;
  int b, h;

  __device__ __forceinline__ ScoreRule(const Scores& scores_, int b_, int h_) : scores(scores_), b(b_), h(h_) {
    scale = scores.scale;
    if constexpr (kGeneral) {
      if (scores.device_scale != nullptr) scale = load_global(scores.device_scale + b * scores.device_scale_stride);
    }
    factor_log2 = factor_of(scores);
  }
  __device__ __forceinline__ static float factor_of(const Scores& scores) {
    return kGeneral ? 1.0f : scores.scale * kLog2e;
  }

  // `all` is the interval of keys that no row of the fragment masks; [begin, end) the keys of the tile.
  __device__ __forceinline__ static bool is_whole(Interval all, int begin, int end) {
    return begin >= all.begin && end <= all.end;
  }
  __device__ __forceinline__ static bool needs_mask(Interval all, int begin, int end) {
    return kGeneral || !is_whole(all, begin, end);
  }

  // The first round of what apply() will read from memory. `whole`: no row masks any key of the tile.
  template <int kCols>
  __device__ __forceinline__ void load_ahead(ScoreWords<kCols>& words, const Position<>& at, const Sequence& sequence,
                                             bool whole) const {
    const ScoreTensor& first = scores.bias.data != nullptr ? scores.bias : scores.mask;
    if (first.data != nullptr) ScoreReader<false>(first, b, h, at).load(words, 0, at, sequence, whole);
  }

  // Products to scores, in place. Call it where needs_mask() holds.
  template <int kRows, int kCols>
  __device__ __forceinline__ void apply(Fragment<kRows, kCols>& s, const Position<>& at,
                                        const Sequence& sequence) const {
    ScoreWords<kCols> words;
    if constexpr (kGeneral) load_ahead(words, at, sequence, false);
    apply(s, at, sequence, false, words);
  }
  // The same with what load_ahead() has loaded.
  template <int kRows, int kCols>
  __device__ __forceinline__ void apply(Fragment<kRows, kCols>& s, const Position<>& at, const Sequence& sequence,
                                        bool whole, ScoreWords<kCols>& words) const {
    scale_bias_and_mask<false>(s, at, sequence, whole, words);
    if (whole) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = opaque(at.row(r));
      hide_outside(s, r, at, sequence.keys(i), sequence.sink_keys());
      if (kGeneral && !sequence.sees_all_keys(i)) {
        hide_others(s, r, at, load_global(sequence.row_segments() + i), sequence.key_segments());
      }
    }
  }
  // The same of S^T: rows of the fragment are keys, columns queries. needs_mask() then compares intervals of queries.
  template <int kRows, int kCols>
  __device__ __forceinline__ void apply_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                   const Sequence& sequence) const {
    ScoreWords<kCols> words;
    scale_bias_and_mask<true>(s, at, sequence, false, words);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = opaque(at.row(r));
      hide_outside(s, r, at, sequence.rows(j), 0);
      if (kGeneral && !sequence.seen_by_all_rows(j)) {
        hide_others(s, r, at, load_global(sequence.key_segments() + j), sequence.row_segments());
      }
    }
  }

 private:
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
    if (const int sink_end = sinks - at.first_col; sinks > 0 && sink_end > 0) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const int col = Position<>::col_offset(c);
        s.v[r][c] = col >= begin || col < sink_end ? s.v[r][c] : minus_infinity();
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < kCols; ++c) s.v[r][c] = Position<>::col_offset(c) >= begin ? s.v[r][c] : minus_infinity();
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

  // The first round of `words` has been loaded, except of what is transposed.
  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ void scale_bias_and_mask(Fragment<kRows, kCols>& s, const Position<>& at,
                                                      const Sequence& sequence, bool whole,
                                                      ScoreWords<kCols>& words) const {
    if constexpr (kGeneral) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) s.v[r][c] = multiply(s.v[r][c], scale * kLog2e);
      }
      const auto combine = [&](const ScoreTensor& tensor, bool loaded, const auto& with) {
        if (tensor.data == nullptr) return;
        const ScoreReader<kTransposed> reader(tensor, b, h, at);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r % 2 != 0 && reader.two_rows()) continue;
          if (r > 0 || !loaded) reader.load(words, r, at, sequence, whole);
          reader.use(s, words, r, with);
        }
      };
      combine(scores.bias, !kTransposed, [](float score, float element) { return fmaf(kLog2e, element, score); });
      combine(scores.mask, !kTransposed && scores.bias.data == nullptr,
              [](float score, float element) { return element != 0.0f ? score : minus_infinity(); });
    }
  }
};

}  // namespace jfa
