// Stands in for csrc/sm80/ptx.cuh: the same functions, carried out by the emulator's machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/device.cuh"

namespace jfa::sm80 {

inline void copy_async_16(uint32_t shared, const void* global, bool valid, Site site = {}) {
  emulator::machine().start_copy(shared, global, 16, valid, {"copy_async_16", site});
}
inline void copy_async_commit() { emulator::machine().commit_copies(); }
template <int kPending>
inline void copy_async_wait() {
  emulator::machine().wait_for_copies(kPending);
}

// One lane's part of ldmatrix.x4: the row it reads for the warp, and the registers it gets.
struct MatrixOperand {
  uint32_t address;
  uint16_t row[8];
  uint32_t r[4];
};

// Lane 4 g + t gets of each matrix elements (g, 2t) and (g, 2t + 1), of the transposed one (2t, g) and (2t + 1, g).
template <bool kTransposed>
inline void load_matrices(uint32_t (&r)[4], uint32_t address, const emulator::Where& where) {
  MatrixOperand mine;
  mine.address = address;
  memcpy(mine.row, emulator::machine().read_shared(address, 16, where), 16);
  emulator::machine().collective(mine, where, [](MatrixOperand* const(&lanes)[kWarpThreads]) {
    emulator::Counters& count = emulator::machine().count();
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int col) -> uint32_t { return lanes[matrix * 8 + row]->row[col]; };
      for (int lane = 0; lane < kWarpThreads; ++lane) {
        const int g = lane / 4, t = lane % 4;
        lanes[lane]->r[matrix] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                             : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
      int rows_in_banks[8] = {};  // a row takes four of the 32 banks
      for (int row = 0; row < 8; ++row) ++rows_in_banks[lanes[matrix * 8 + row]->address / 16 % 8];
      count.matrices += 1;
      count.matrix_wavefronts += *std::max_element(rows_in_banks, rows_in_banks + 8);
    }
  });
  memcpy(r, mine.r, sizeof(r));
}
inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address, Site site = {}) {
  load_matrices<false>(r, address, {"load_matrix_x4", site});
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address, Site site = {}) {
  load_matrices<true>(r, address, {"load_matrix_x4_transposed", site});
}

// Exact, and without a branch, so that a loop over it is vectorised.
template <class Element>
inline float to_float(uint16_t bits);
template <>
inline float to_float<__nv_bfloat16>(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
template <>
inline float to_float<__half>(uint16_t bits) {
  const uint32_t wide = uint32_t(bits & 0x7fff) << 13 | uint32_t(bits & 0x8000) << 16;
  float value;
  memcpy(&value, &wide, 4);
  value *= 0x1p112f;  // the exponents' biases differ by 127 - 15
  return (bits & 0x7c00) == 0x7c00 ? value * INFINITY + (bits & 0x3ff ? NAN : 0.0f) : value;
}

struct MmaOperand {
  const uint32_t *a, *b;
  float* d[4];
};

// The sums are of exact products in f32, in the order of k; tensor cores add in an order and with a rounding of their
// own.
template <class Element>
inline void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                Site site = {}) {
  const uint32_t b[2] = {b0, b1};
  MmaOperand mine = {a, b, {&d0, &d1, &d2, &d3}};
  emulator::machine().collective(mine, {"mma", site}, [](MmaOperand* const(&lanes)[kWarpThreads]) {
    uint16_t a_bits[16][16], b_bits[8][16];  // [m][k], [n][k]
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) memcpy(&a_bits[g + i % 2 * 8][2 * t + i / 2 * 8], &lanes[lane]->a[i], 4);
      for (int i = 0; i < 2; ++i) memcpy(&b_bits[g][2 * t + i * 8], &lanes[lane]->b[i], 4);
    }
    float a_values[16][16], b_values[16][8], d_values[16][8] = {};  // [m][k], [k][n], [m][n]
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) a_values[m][k] = to_float<Element>(a_bits[m][k]);
    }
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) b_values[k][n] = to_float<Element>(b_bits[n][k]);
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) d_values[m][n] += a_values[m][k] * b_values[k][n];
      }
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) *lanes[lane]->d[i] += d_values[g + i / 2 * 8][2 * t + i % 2];
    }
    ++emulator::machine().count().products;
  });
}

}  // namespace jfa::sm80
