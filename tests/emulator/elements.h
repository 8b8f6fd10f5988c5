// Elements of matrices as floats: exact, and without branches where loops over them are to be vectorised.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

enum ElementKind : int { kHalf, kBfloat16, kE4m3, kE5m2 };
constexpr int element_bytes(int kind) { return kind == kE4m3 || kind == kE5m2 ? 1 : 2; }

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
inline float half_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits & 0x7fff) << 13 | uint32_t(bits & 0x8000) << 16;
  float value;
  memcpy(&value, &wide, 4);
  value *= 0x1p112f;  // the exponents' biases differ by 127 - 15
  return (bits & 0x7c00) == 0x7c00 ? value * INFINITY + (bits & 0x3ff ? NAN : 0.0f) : value;
}
// Its exponent has the bias of a half's.
inline float e5m2_to_float(uint8_t bits) { return half_to_float(uint16_t(bits) << 8); }
inline float e4m3_to_float(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return NAN;  // there is no infinity
  const uint32_t wide = uint32_t(bits & 0x7f) << 20 | uint32_t(bits & 0x80) << 24;
  float value;
  memcpy(&value, &wide, 4);
  return value * 0x1p120f;
}

// `bytes` hold `count` elements.
inline void to_floats(int kind, const unsigned char* bytes, int count, float* to) {
  if (kind == kE4m3) {
    for (int i = 0; i < count; ++i) to[i] = e4m3_to_float(bytes[i]);
  } else if (kind == kE5m2) {
    for (int i = 0; i < count; ++i) to[i] = e5m2_to_float(bytes[i]);
  } else {
    for (int i = 0; i < count; ++i) {
      uint16_t bits;
      memcpy(&bits, bytes + 2 * i, 2);
      to[i] = kind == kHalf ? half_to_float(bits) : bfloat16_to_float(bits);
    }
  }
}

}  // namespace emulator
