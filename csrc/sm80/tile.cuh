// Tiles of 16-bit elements in shared memory, and products of them by mma.m16n8k16.
//
// A tile is row-major. Its rows are cut into chunks of 16 bytes, and a chunk's place is swizzled by its row, so that
// the eight rows ldmatrix reads at once, a chunk each, fall into different banks.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"
#include "sm80/ptx.cuh"

namespace jfa::sm80 {

constexpr int kChunk = 8;  // elements in 16 bytes

template <int kRows_, int kCols_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunks = kCols / kChunk;
  static constexpr int kRowBytes = kCols * 2;
  static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;  // chunks that change places among themselves
  static_assert(kCols % 32 == 0 && kRows % 16 == 0, "tiles have 16-row blocks and whole swizzle groups");

  alignas(128) uint16_t elements[kRows * kCols];

  // Rows a multiple of 128 bytes long need eight places for a chunk; others already alternate between two.
  __device__ __forceinline__ static int swizzle(int row) { return kGroup == 8 ? row % 8 : row / 2 % 4; }

  __device__ __forceinline__ static uint32_t offset_bytes(int row, int chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * 16;
  }
};

// Starts the copy of rows [first_row, first_row + kRows) of one head into a tile. Rows that take no part and columns at
// or past `dim` become zero: what lies there belongs to others, and 0 x NaN is NaN. A thread's chunks all have the same
// swizzle, so that its addresses differ by constants and one stride.
template <class Tile, int kThreads, class TakesPart>
__device__ __forceinline__ void load_tile(const Tile& tile, const uint16_t* head, int64_t row_stride, int first_row,
                                          const TakesPart& takes_part, int dim) {
  constexpr int kGroup = Tile::kGroup;
  constexpr int kRowStep = kThreads / kGroup;
  static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0, "the block's threads cover whole groups of rows");
  const int thread = opaque(thread_index());
  const int row = thread / kGroup;
  const int col = thread % kGroup * kChunk;
  const uint32_t shared = shared_address(tile.elements) + Tile::offset_bytes(row, col / kChunk);
  const uint16_t* source = head + (first_row + row) * row_stride + col;
#pragma unroll
  for (int n = 0; n < Tile::kRows / kRowStep; ++n) {
    const bool row_valid = takes_part(first_row + row + n * kRowStep);
#pragma unroll
    for (int c = 0; c < Tile::kCols; c += kGroup * kChunk) {
      copy_async_16(shared + n * kRowStep * Tile::kRowBytes + c * 2, source + c, row_valid && col + c < dim);
    }
    source += kRowStep * row_stride;
  }
}

// The same where the rows of an interval take part.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_tile(const Tile& tile, const uint16_t* head, int64_t row_stride, int first_row,
                                          const Interval& valid, int dim) {
  load_tile<Tile, kThreads>(tile, head, row_stride, first_row, [&](int row) { return valid.contains(row); }, dim);
}

// One lane's addresses for ldmatrix.x4 over the 16 x 16 blocks of a tile: rows of blocks side by side, and every
// kColumnStep-th column of them.
template <class Tile, int kColumnStep>
struct LaneBlocks {
  uint32_t address;  // of this lane's row in the first block
  int chunk;         // of this lane's row in its group, swizzled: steps of 16 rows keep the swizzle

  // kRowsFirst: the four 8 x 8 matrices in the order top left, bottom left, top right, bottom right;
  // otherwise top left, top right, bottom left, bottom right.
  template <bool kRowsFirst>
  __device__ __forceinline__ static LaneBlocks at(const Tile& tile, int first_row, int first_col) {
    const int lane = lane_index();
    const int row = first_row + (kRowsFirst ? lane % 16 : lane / 16 * 8 + lane % 8);
    const int side = kRowsFirst ? lane / 16 : lane / 8 % 2;
    const int group = first_col / kChunk / Tile::kGroup;
    return {shared_address(tile.elements) + row * Tile::kRowBytes + group * Tile::kGroup * 16,
            (first_col / kChunk % Tile::kGroup + side) ^ Tile::swizzle(row)};
  }

  // A step along the columns changes other bits of the chunk than `chunk` has set, so it acts by xor.
  __device__ __forceinline__ uint32_t block(int row_block, int col_block) const {
    const int step = col_block * kColumnStep * 2;
    return address + row_block * 16 * Tile::kRowBytes + step / Tile::kGroup * Tile::kGroup * 16 +
           ((step % Tile::kGroup) ^ chunk) * 16;
  }
};

// Operands of product(): operator()(registers, block along m or n, block along k). Whether the contraction runs along
// the tile's columns or its rows decides the order of matrices and the transposition.

// A = tile[m][k]
template <class Tile>
struct RowOperandA {
  LaneBlocks<Tile, 1> lanes;
  __device__ __forceinline__ RowOperandA(const Tile& tile, int first_m)
      : lanes(LaneBlocks<Tile, 1>::template at<true>(tile, first_m, 0)) {}
  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int m, int k) const {
    load_matrix_x4(a, lanes.block(m, k));
  }
};

// A = tile[k][m]
template <class Tile>
struct ColumnOperandA {
  LaneBlocks<Tile, 1> lanes;
  __device__ __forceinline__ ColumnOperandA(const Tile& tile, int first_m)
      : lanes(LaneBlocks<Tile, 1>::template at<false>(tile, 0, first_m)) {}
  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int m, int k) const {
    load_matrix_x4_transposed(a, lanes.block(k, m));
  }
};

// B = tile[n][k]
template <class Tile>
struct RowOperandB {
  LaneBlocks<Tile, 1> lanes;
  __device__ __forceinline__ RowOperandB(const Tile& tile, int first_n)
      : lanes(LaneBlocks<Tile, 1>::template at<false>(tile, first_n, 0)) {}
  __device__ __forceinline__ void operator()(uint32_t (&b)[4], int n, int k) const {
    load_matrix_x4(b, lanes.block(n, k));
  }
};

// B = tile[k][n]
template <class Tile, int kColumnStep = 1>
struct ColumnOperandB {
  static_assert(kColumnStep * 2 <= Tile::kGroup, "warps that interleave their columns do so within a swizzle group");
  LaneBlocks<Tile, kColumnStep> lanes;
  __device__ __forceinline__ ColumnOperandB(const Tile& tile, int first_n)
      : lanes(LaneBlocks<Tile, kColumnStep>::template at<true>(tile, 0, first_n)) {}
  __device__ __forceinline__ void operator()(uint32_t (&b)[4], int n, int k) const {
    load_matrix_x4_transposed(b, lanes.block(k, n));
  }
};

// A = an accumulator, rounded to the element type: two 8-column blocks of it are one 16-column operand.
template <class Element, int kRows, int kCols>
struct FragmentOperandA {
  const Fragment<kRows, kCols>& p;
  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int m, int k) const {
    a[0] = pack<Element>(p.v[2 * m][4 * k], p.v[2 * m][4 * k + 1]);
    a[1] = pack<Element>(p.v[2 * m + 1][4 * k], p.v[2 * m + 1][4 * k + 1]);
    a[2] = pack<Element>(p.v[2 * m][4 * k + 2], p.v[2 * m][4 * k + 3]);
    a[3] = pack<Element>(p.v[2 * m + 1][4 * k + 2], p.v[2 * m + 1][4 * k + 3]);
  }
};

// d += A B over kDepth elements of the contraction.
template <class Element, int kDepth, int kRows, int kCols, class OperandA, class OperandB>
__device__ __forceinline__ void product(Fragment<kRows, kCols>& d, const OperandA& operand_a,
                                        const OperandB& operand_b) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[kRows / 2][4];
#pragma unroll
    for (int m = 0; m < kRows / 2; ++m) operand_a(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kCols / 4; ++n) {
      uint32_t b[4];
      operand_b(b, n, k);
#pragma unroll
      for (int m = 0; m < kRows / 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = 4 * n + 2 * half;
          mma<Element>(d.v[2 * m][c], d.v[2 * m][c + 1], d.v[2 * m + 1][c], d.v[2 * m + 1][c + 1], a[m], b[2 * half],
                       b[2 * half + 1]);
        }
      }
    }
  }
}

// A fragment, rounded, to its places in a tile.
template <class Element, class Tile, int kRows, int kCols, int kColumnStep>
__device__ __forceinline__ void store_fragment(const Tile& tile, const Fragment<kRows, kCols>& d,
                                               const Position<kColumnStep>& at) {
  const uint32_t base = shared_address(tile.elements);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; c += 2) {
      store_shared_32(base + Tile::offset_bytes(at.row(r), at.col(c) / kChunk) + at.col(c) % kChunk * 2,
                      pack<Element>(d.v[r][c], d.v[r][c + 1]));
    }
  }
}

// Rows [begin, end) of a tile, as seen by `threads` threads of which this is `thread`, to rows first_row + begin ... of
// one head, as far as they lie below `rows` and the columns below `dim`.
template <class Tile>
__device__ __forceinline__ void store_rows(const Tile& tile, int begin, int end, int thread, int threads, void* head,
                                           int64_t row_stride, int first_row, int rows, int dim) {
  const uint32_t base = shared_address(tile.elements);
  uint16_t* destination = static_cast<uint16_t*>(head);
#pragma unroll 4
  for (int x = thread; x < (end - begin) * Tile::kChunks; x += threads) {
    const int row = begin + x / Tile::kChunks;
    const int chunk = x % Tile::kChunks;
    if (first_row + row < rows && chunk * kChunk < dim) {
      store_global(reinterpret_cast<uint4*>(destination + (first_row + row) * row_stride + chunk * kChunk),
                   load_shared_128(base + Tile::offset_bytes(row, chunk)));
    }
  }
}

}  // namespace jfa::sm80
