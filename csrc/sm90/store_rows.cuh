// From an accumulator to rows of a tensor, past shared memory.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/schedule.cuh"

namespace jfa::sm90 {

// Four lanes hold a 4 x 4 matrix, a row each; afterwards a column each.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {  // exchange off-diagonal elements of pairs, then of pairs of pairs
    const bool upper = (lane & step) == 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = step == 1 ? 2 * i : i;
      const uint32_t received = shuffle_xor(upper ? x[n + step] : x[n], step);
      x[n] = upper ? x[n] : received;
      x[n + step] = upper ? received : x[n + step];
    }
  }
}

// A warp's 16 rows, each times its factor, from `first_row` on of one head of `to`, which has `length` rows of `dim`
// columns. A quad of lanes holds 32 columns of a row in pieces of 2; it turns them into pieces of 8, 16 bytes a lane.
template <class Element, int kCols>
__device__ __forceinline__ void store_rows(const Fragment<2, kCols>& x, const float (&factor)[2], const Tensor& to,
                                           int b, int h, int first_row, int length, int dim) {
  static_assert(kCols % 8 == 0, "rows are stored 32 columns at a time");
  const int quad = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = opaque(Position<>(first_row, 0).row(r));
    uint16_t* row = head_of(to, b, h) + i * to.row_stride;
#pragma unroll
    for (int block = 0; block < kCols / 8; ++block) {
      uint32_t y[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int c = 8 * block + 2 * n;
        y[n] = pack<Element>(x.v[r][c] * factor[r], x.v[r][c + 1] * factor[r]);
      }
      transpose_quad(y, quad);
      const int col = 32 * block + 8 * quad;
      if (i < length && col < dim) store_global_128(row + col, uint4{y[0], y[1], y[2], y[3]});
    }
  }
}

}  // namespace jfa::sm90
