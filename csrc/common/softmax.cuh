// Softmax over keys that come tile by tile (online softmax), and its inverse for the backward. Which products are fused
// with an addition is written out: left to the compiler, it would depend on a row's place in the tile.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"

namespace jfa {

constexpr float kLargestFusedReference = 1 << 24;  // above, neighbouring floats differ by 2

// A row that has seen nothing yet: any finite reference gives 2^-inf = 0, and avoids -inf - -inf.
__device__ __forceinline__ float reference_log2(float m, float factor_log2) {
  return m == minus_infinity() ? 0.0f : multiply(m, factor_log2);
}

// Fused, s factor - reference is off by the rounding of the reference, the same for all scores of the row; the division
// by the sum takes it out again. Only where that rounding is more than 1 could it overflow or vanish: there the largest
// score is subtracted first, and the reference is 0.
template <int kRows, int kCols>
__device__ __forceinline__ void shift_large(Fragment<kRows, kCols>& s, const float (&m)[kRows],
                                            float (&reference)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float shift = fabsf(reference[r]) > kLargestFusedReference ? m[r] : 0.0f;
    if (shift != 0.0f) reference[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < kCols; ++c) s.v[r][c] -= shift;
  }
}

// The sink of a head, in log2 units; -inf, which changes nothing: there is none.
__device__ __forceinline__ float sink_log2(const HeadNumbers& sinks, int b, int h) {
  return sinks.data == nullptr ? minus_infinity() : load_global(sinks.data + b * sinks.batch_stride + h) * kLog2e;
}
// Whether row i sees one: not where it belongs to no sequence.
__device__ __forceinline__ bool sees_sink(const HeadNumbers& sinks, const Sequence& sequence, int i) {
  return sinks.data != nullptr && sequence.belongs(i);
}

// A row's output is to be multiplied by the result; also its log-sum-exp in natural units. `part` is this thread's part
// of the row's sum.
__device__ __forceinline__ float finish_row(float m, float part, float factor_log2, float sink, float& lse) {
  float sum = sum_over_row(part);
  float top = m, factor = factor_log2, of_keys = 1.0f;
  if (sink != minus_infinity()) {
    // One more term, and all terms relative to the larger of the two: neither overflows. Equal infinities are no NaN.
    const float reference = multiply(m, factor_log2);
    top = fmaxf(reference, sink);
    factor = 1.0f;
    of_keys = exp2_approximate(reference - top);
    sum = fmaf(sum, of_keys, sink == top ? 1.0f : exp2_approximate(sink - top));
  }
  lse = sum == 0.0f ? minus_infinity() : fmaf(top, factor, log2_approximate(sum)) * kLn2;
  return sum == 0.0f ? 0.0f : of_keys * reciprocal_approximate(sum);  // a sum is at least 1: its largest term
}

template <int kRows>
struct OnlineSoftmax {
  float factor_log2;  // from a score to log2 units
  float m[kRows];     // largest score so far, -inf before the first visible one
  float l[kRows];     // this thread's part of sum of 2^((s - m) factor)

  __device__ __forceinline__ explicit OnlineSoftmax(float factor) : factor_log2(factor) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m[r] = minus_infinity();
      l[r] = 0.0f;
    }
  }

  // Scores of the next tile become probabilities relative to the new maximum; what was accumulated in `o` follows it.
  template <int kCols, int kOutCols>
  __device__ __forceinline__ void update(Fragment<kRows, kCols>& s, Fragment<kRows, kOutCols>& o) {
    float reference[kRows];  // m in log2 units
    bool large = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float tile_max = s.v[r][0];
#pragma unroll
      for (int c = 1; c < kCols; ++c) tile_max = fmaxf(tile_max, s.v[r][c]);
      const float previous = m[r];
      m[r] = fmaxf(previous, max_over_row(tile_max));
      reference[r] = reference_log2(m[r], factor_log2);
      large |= fabsf(reference[r]) > kLargestFusedReference;
      const float correction = exp2_approximate(multiply(previous, factor_log2) - reference[r]);
      l[r] = multiply(l[r], correction);
      o.scale_row(r, correction);
    }
    if (large) shift_large(s, m, reference);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s.v[r][c] = exp2_approximate(fmaf(s.v[r][c], factor_log2, -reference[r]));
        l[r] += s.v[r][c];
      }
    }
  }

  __device__ __forceinline__ float finish(int r, float sink, float& lse) const {
    return finish_row(m[r], l[r], factor_log2, sink, lse);
  }
};

// Online softmax whose reference lags behind: any number that is not far below a row's largest score serves as well as
// the largest, so the reference moves only when a score exceeds it by kLag in log2 units, and what was accumulated
// almost never has to be corrected. Probabilities then reach 2^kLag, which both element types hold.
template <int kRows>
struct LaggingSoftmax {
  static constexpr float kLag = 8.0f;
  static constexpr float kLargestLag = 1e38f;  // finite also for the smallest scales: -inf + inf would be NaN

  float factor_log2;  // from a score to log2 units
  float lag;          // kLag as a difference of scores
  bool as_integers;   // every reference of the warp is so large that scores above it are positive, see exceeds()
  float m[kRows];     // reference, -inf before the first visible score
  float l[kRows];     // this thread's part of sum of 2^((s - m) factor)

  __device__ __forceinline__ explicit LaggingSoftmax(float factor)
      : factor_log2(factor), lag(fminf(kLag / factor, kLargestLag)) {}

  __device__ __forceinline__ void start_row_sums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m[r] = minus_infinity();
      l[r] = 0.0f;
    }
    as_integers = false;
  }

  // Scores of the next tile become probabilities. True: references moved, and what was accumulated for row r is to be
  // multiplied by correction[r]. Whether a row's reference moves depends on that row alone. All lanes take part.
  template <int kCols>
  __device__ __forceinline__ bool update(Fragment<kRows, kCols>& s, float (&correction)[kRows]) {
    const bool moved = any_lane(exceeds(s));
    if (moved) {
      bool positive = true;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float row_max = max_over_row(max_of_row(s, r));
        const float next = row_max > m[r] + lag ? row_max : m[r];
        correction[r] = exp2_approximate(multiply(m[r], factor_log2) - reference_log2(next, factor_log2));
        m[r] = next;
        l[r] = multiply(l[r], correction[r]);
        positive &= m[r] + lag >= 0.0f;
      }
      as_integers = !any_lane(!positive);
    }
    float reference[kRows];
    bool large = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference[r] = reference_log2(m[r], factor_log2);
      large |= fabsf(reference[r]) > kLargestFusedReference;
    }
    if (large) shift_large(s, m, reference);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float other = 0.0f, sum = 0.0f;
#pragma unroll
      for (int c = 0; c < kCols; c += 2) {
        s.v[r][c] = exp2_approximate(fmaf(s.v[r][c], factor_log2, -reference[r]));
        s.v[r][c + 1] = exp2_approximate(fmaf(s.v[r][c + 1], factor_log2, -reference[r]));
        sum += s.v[r][c];
        other += s.v[r][c + 1];
      }
      l[r] += sum + other;
    }
    return moved;
  }

  __device__ __forceinline__ float finish(int r, float sink, float& lse) const {
    return finish_row(m[r], l[r], factor_log2, sink, lse);
  }

 private:
  // Whether a score of this thread is too far above its row's reference. Floats of which one is positive compare like
  // the integers of the same bits, and of those one instruction takes the largest of three.
  template <int kCols>
  __device__ __forceinline__ bool exceeds(const Fragment<kRows, kCols>& s) const {
    bool found = false;
    if (!as_integers) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) found |= max_of_row(s, r) > m[r] + lag;
      return found;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int largest = max_of_3(bits_of(s.v[r][0]), bits_of(s.v[r][1]), bits_of(s.v[r][2]));
      int other = bits_of(s.v[r][3]);  // two chains: half the latency
#pragma unroll
      for (int c = 4; c < kCols; c += 4) {
        largest = max_of_3(largest, bits_of(s.v[r][c]), bits_of(s.v[r][c + 1]));
        other = max_of_3(other, bits_of(s.v[r][c + 2]), bits_of(s.v[r][c + 3]));
      }
      found |= max(largest, other) > bits_of(m[r] + lag);
    }
    return found;
  }
  template <int kCols>
  __device__ __forceinline__ static float max_of_row(const Fragment<kRows, kCols>& s, int r) {
    float largest = s.v[r][0], other = s.v[r][1];
#pragma unroll
    for (int c = 2; c < kCols; c += 2) {
      largest = fmaxf(largest, s.v[r][c]);
      other = fmaxf(other, s.v[r][c + 1]);
    }
    return fmaxf(largest, other);
  }
};

// The backward of one tile: with p = 2^(s factor - lse), ds = p (dp - delta). Scores become p and `dp` becomes ds.
// lse is in log2 units and +inf for a row that sees nothing. A masked score gives 0 for both, whatever else is NaN.
template <bool kMasked, int kRows, int kCols>
__device__ __forceinline__ void softmax_gradient(Fragment<kRows, kCols>& s, Fragment<kRows, kCols>& dp,
                                                 float factor_log2, const float (&lse_log2)[kRows],
                                                 const float (&delta)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const bool hidden = kMasked && s.v[r][c] == minus_infinity();
      const float p = exp2_approximate(fmaf(s.v[r][c], factor_log2, -lse_log2[r]));
      s.v[r][c] = hidden ? 0.0f : p;
      dp.v[r][c] = hidden ? 0.0f : p * (dp.v[r][c] - delta[r]);
    }
  }
}

// The same in two steps, for those who have the scores before dp. Between the steps a masked score is kept as -0, which
// no exponential gives, and what dropout has marked is negative.
template <bool kMasked, int kRows, int kCols>
__device__ __forceinline__ void probabilities_of_rows(Fragment<kRows, kCols>& s, float factor_log2,
                                                      const float (&lse_log2)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const bool hidden = kMasked && s.v[r][c] == minus_infinity();
      const float p = exp2_approximate(fmaf(s.v[r][c], factor_log2, -lse_log2[r]));
      s.v[r][c] = hidden ? -0.0f : p;
    }
  }
}
template <bool kMasked, bool kMarked, int kRows, int kCols>
__device__ __forceinline__ void gradients_of_rows(const Fragment<kRows, kCols>& p, Fragment<kRows, kCols>& dp,
                                                  const float (&delta)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const float x = p.v[r][c];
      const bool hidden = kMasked && bits_of(x) == bits_of(-0.0f);
      dp.v[r][c] = hidden ? 0.0f : (kMarked ? fabsf(x) : x) * (dp.v[r][c] - delta[r]);
    }
  }
}

// The same of a transposed fragment, whose columns are queries: their statistics lie in shared memory, from `lse_log2`
// and `delta` on those of the thread's first column.
template <bool kMasked, int kRows, int kCols>
__device__ __forceinline__ void probabilities_of_columns(Fragment<kRows, kCols>& s, float factor_log2,
                                                         uint32_t lse_log2) {
#pragma unroll
  for (int c = 0; c < kCols; c += 2) {
    const float2 lse = load_shared_f32x2(lse_log2 + Position<>::col_offset(c) * 4);
#pragma unroll
    for (int n = 0; n < 2 * kRows; ++n) {
      float& x = s.v[n / 2][c + n % 2];
      const float p = exp2_approximate(fmaf(x, factor_log2, n % 2 == 0 ? -lse.x : -lse.y));
      x = kMasked && x == minus_infinity() ? -0.0f : p;
    }
  }
}
template <bool kMasked, bool kMarked, int kRows, int kCols>
__device__ __forceinline__ void gradients_of_columns(const Fragment<kRows, kCols>& p, Fragment<kRows, kCols>& dp,
                                                     uint32_t delta) {
#pragma unroll
  for (int c = 0; c < kCols; c += 2) {
    const float2 d = load_shared_f32x2(delta + Position<>::col_offset(c) * 4);
#pragma unroll
    for (int n = 0; n < 2 * kRows; ++n) {
      const float x = p.v[n / 2][c + n % 2];
      float& ds = dp.v[n / 2][c + n % 2];
      const bool hidden = kMasked && bits_of(x) == bits_of(-0.0f);
      ds = hidden ? 0.0f : (kMarked ? fabsf(x) : x) * (ds - (n % 2 == 0 ? d.x : d.y));
    }
  }
}

// The same in other steps, for those who have dp when it comes to exponentials: these then run beside all the rest.
// First scores become exponents,
template <int kRows, int kCols>
__device__ __forceinline__ void exponents_of_columns(Fragment<kRows, kCols>& s, float factor_log2, uint32_t lse_log2) {
#pragma unroll
  for (int c = 0; c < kCols; c += 2) {
    const float2 lse = load_shared_f32x2(lse_log2 + Position<>::col_offset(c) * 4);
#pragma unroll
    for (int n = 0; n < 2 * kRows; ++n) {
      float& x = s.v[n / 2][c + n % 2];
      x = fmaf(x, factor_log2, n % 2 == 0 ? -lse.x : -lse.y);
    }
  }
  s.settle_all();
}
// then p and ds. What is masked is -inf still.
template <bool kMasked, int kRows, int kCols>
__device__ __forceinline__ void softmax_gradient_of_columns(Fragment<kRows, kCols>& s, Fragment<kRows, kCols>& dp,
                                                            uint32_t delta) {
#pragma unroll
  for (int c = 0; c < kCols; c += 2) {
    const float2 d = load_shared_f32x2(delta + Position<>::col_offset(c) * 4);
#pragma unroll
    for (int n = 0; n < 2 * kRows; ++n) {
      float& x = s.v[n / 2][c + n % 2];
      float& ds = dp.v[n / 2][c + n % 2];
      const bool hidden = kMasked && x == minus_infinity();
      x = exp2_approximate(x);
      ds = hidden ? 0.0f : x * (ds - (n % 2 == 0 ? d.x : d.y));
    }
  }
}

// What softmax_gradient() wants of a query row.
__device__ __forceinline__ float lse_in_log2_units(float lse) {
  return lse == minus_infinity() ? INFINITY : lse * kLog2e;
}

// The same of a fragment's rows.
template <int kRows>
__device__ __forceinline__ void load_row_statistics(const Problem& p, const Gradients& g, const Sequence& sequence,
                                                    int b, int h, const Position<>& at, float (&lse_log2)[kRows],
                                                    float (&delta)[kRows]) {
  const int64_t origin = (int64_t(b) * p.shape.heads + h) * p.shape.q_len;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = at.row(r);
    const bool inside = i < sequence.q_len;
    lse_log2[r] = lse_in_log2_units(inside ? load_global(p.lse + origin + i) : minus_infinity());
    delta[r] = inside ? load_global(g.delta + origin + i) : 0.0f;
  }
}

}  // namespace jfa
