// Softmax over keys that come tile by tile (online softmax), and its inverse for the backward. Which products are fused
// with an addition is written out: left to the compiler, it would depend on a row's place in the tile.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"

namespace jfa {

constexpr float kLargestFusedReference = 1 << 24;  // above, neighbouring floats differ by 2

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
      // A row that has seen nothing yet: any finite reference gives 2^-inf = 0, and avoids -inf - -inf.
      reference[r] = m[r] == minus_infinity() ? 0.0f : multiply(m[r], factor_log2);
      large |= fabsf(reference[r]) > kLargestFusedReference;
      const float correction = exp2_approximate(multiply(previous, factor_log2) - reference[r]);
      l[r] = multiply(l[r], correction);
      o.scale_row(r, correction);
    }
    // Fused, s factor - reference is off by the rounding of the reference, the same for all scores of the row; the
    // division by the sum takes it out again. Only where that rounding is more than 1 could it overflow or vanish.
    if (large) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float shift = fabsf(reference[r]) > kLargestFusedReference ? m[r] : 0.0f;
        if (shift != 0.0f) reference[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < kCols; ++c) s.v[r][c] -= shift;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s.v[r][c] = exp2_approximate(fmaf(s.v[r][c], factor_log2, -reference[r]));
        l[r] += s.v[r][c];
      }
    }
  }

  // Completes row r: what to multiply its output by, and its log-sum-exp in natural units.
  __device__ __forceinline__ float finish(int r, float& lse) const {
    const float sum = sum_over_row(l[r]);
    lse = sum == 0.0f ? minus_infinity() : fmaf(m[r], factor_log2, log2f(sum)) * kLn2;
    return sum == 0.0f ? 0.0f : 1.0f / sum;
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

// What softmax_gradient() wants of a fragment's rows.
template <int kRows>
__device__ __forceinline__ void load_row_statistics(const Problem& p, const Gradients& g, const Sequence& sequence,
                                                    int b, int h, const Position<>& at, float (&lse_log2)[kRows],
                                                    float (&delta)[kRows]) {
  const int64_t origin = (int64_t(b) * p.shape.heads + h) * p.shape.q_len;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = at.row(r);
    const bool inside = i < sequence.q_len;
    const float lse = inside ? load_global(p.lse + origin + i) : minus_infinity();
    lse_log2[r] = lse == minus_infinity() ? INFINITY : lse * kLog2e;
    delta[r] = inside ? load_global(g.delta + origin + i) : 0.0f;
  }
}

}  // namespace jfa
