// A warp's accumulator of a matrix product, as one thread holds it: rows and columns of its own, and where they lie.
// mma.m16n8 and wgmma.m64nN spread a tile over a warp's lanes in the same way: with g = lane / 4 and t = lane % 4, a
// thread holds of each 16 x 8 block rows g and g + 8, columns 2t and 2t + 1.
#pragma once

#include "common/device.cuh"

namespace jfa {

template <int kRows_, int kCols_>
struct Fragment {
  static constexpr int kRows = kRows_;  // two of each 16
  static constexpr int kCols = kCols_;  // two of each 8
  float v[kRows][kCols];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) v[r][c] = 0.0f;
    }
  }

  __device__ __forceinline__ void settle_all() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) settle(v[r][c]);
    }
  }

  __device__ __forceinline__ void scale_row(int r, float factor) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) v[r][c] *= factor;
  }
};

// The matrix coordinates of a fragment's elements, given those of the warp's first element. Warps that share a tile's
// columns may take every kColumnStep-th block of 16 instead of neighbouring ones.
template <int kColumnStep = 1>
struct Position {
  int first_row;
  int first_col;

  __device__ __forceinline__ Position(int row, int col)
      : first_row(row + lane_index() / 4), first_col(col + lane_index() % 4 * 2) {}

  __device__ __forceinline__ int row(int r) const { return first_row + r * 8; }
  __device__ __forceinline__ int col(int c) const { return first_col + col_offset(c); }
  __device__ __forceinline__ static constexpr int col_offset(int c) {
    return c / 4 * 16 * kColumnStep + c / 2 % 2 * 8 + c % 2;
  }
};

// Reductions over the four lanes that share a row.
__device__ __forceinline__ float max_over_row(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float sum_over_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace jfa
