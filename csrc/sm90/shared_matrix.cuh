// Matrices of 16-bit elements in shared memory as wgmma reads them and TMA writes them.
//
// A tile is cut into chunks of 64 columns; a chunk is kRows rows of 128 bytes, one TMA box, with the 128-byte swizzle:
// 16 bytes at column c of row r lie in place (c / 8) ^ (r % 8) of their row. A descriptor (PTX ISA 9.0, 9.7.15.5.1)
// names the swizzle, where the matrix starts, the stride of groups of 8 rows and that of chunks.
#pragma once

#include "common/device.cuh"
#include "common/math.cuh"

namespace jfa::sm90 {

constexpr int kChunkCols = 64;
constexpr int kRowBytes = 128;
constexpr int kSwizzleBytes = 8 * kRowBytes;  // the pattern repeats; tiles start at multiples of it

template <int kRows_, int kCols_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunks = (kCols + kChunkCols - 1) / kChunkCols;
  static constexpr int kChunkBytes = kRows * kRowBytes;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static_assert(kRows % 8 == 0 && kCols % 16 == 0, "tiles have whole groups of 8 rows and whole steps of wgmma");

  alignas(kSwizzleBytes) unsigned char bytes[kBytes];

  // Of the 16 bytes that hold columns 8 chunk16 to 8 chunk16 + 7 of a row.
  __device__ __forceinline__ static uint32_t offset_bytes(int row, int chunk16) {
    return chunk16 / 8 * kChunkBytes + row * kRowBytes + (chunk16 % 8 ^ row % 8) * 16;
  }
};

// The narrowest swizzle that rows of so many bytes fit.
constexpr int swizzled_bytes(int bytes) { return bytes <= 32 ? 32 : bytes <= 64 ? 64 : 128; }

// The same of bytes, one chunk: rows of kCols bytes, with the swizzle of as many.
template <int kRows, int kCols_>
struct ByteTile {
  static constexpr int kCols = kCols_;
  static constexpr int kBytes = kRows * kCols;
  static_assert(kCols == 32 || kCols == 64 || kCols == 128, "there are swizzles of 32, 64 and 128 bytes");

  // Of bytes 16 chunk16 to 16 chunk16 + 15 of a row.
  __device__ __forceinline__ static uint32_t offset_bytes(int row, int chunk16) {
    return row * kCols + (chunk16 ^ row / (kRowBytes / kCols) % (kCols / 16)) * 16;
  }
};

// Makes rows of a tile that has landed zeros, unless keep(row): what lies there belongs to others, and 0 x NaN is NaN.
// A warp does it, and then says that the tile is full.
template <class Tile, class Keep>
__device__ __forceinline__ void clean_rows(uint32_t tile, const Keep& keep) {
#pragma unroll 1
  for (int row = lane_index(); row < Tile::kRows; row += kWarpThreads) {
    if (keep(row)) continue;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kChunks * 8; ++chunk) {
      store_shared_128(tile + Tile::offset_bytes(row, chunk), uint4{0, 0, 0, 0});
    }
  }
}

// A descriptor is this low word and a constant high one. It is the same in all lanes, and known to be so: the compiler
// then keeps it in a uniform register, to which the constants of each step are added.
// `chunk_stride_bytes` matters only where a product's N (or M) spans chunks. In a cluster the upper bits of an address
// hold the block's rank: unmasked, they would run into the stride.
__device__ __forceinline__ uint32_t descriptor(uint32_t address, int chunk_stride_bytes = 16) {
  return broadcast(uint32_t(chunk_stride_bytes) / 16 << 16 | (address & 0x3ffff) >> 4);
}
// A low word made without such a stride, with it.
__device__ __forceinline__ uint32_t with_chunk_stride(uint32_t low, int chunk_stride_bytes) {
  return low + (uint32_t(chunk_stride_bytes) / 16 - 1 << 16);
}
__device__ __forceinline__ uint64_t descriptor_at(uint32_t low, int offset_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kGroupStride = uint64_t(kSwizzleBytes / 16) << 32;
  return kSwizzle128 | kGroupStride | (low + offset_bytes / 16);
}

}  // namespace jfa::sm90
