// Stands in for csrc/sm80/ptx.cuh: the same functions, carried out by the emulator's machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

template <class Element>
inline float to_float(uint16_t bits) {
  return std::is_same_v<Element, __half> ? emulator::half_to_float(bits) : emulator::bfloat16_to_float(bits);
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
