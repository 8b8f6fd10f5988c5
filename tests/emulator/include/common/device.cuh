// Stands in for csrc/common/device.cuh: the same functions, carried out by the emulator's machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "elements.h"
#include "machine.h"
#include "tma.h"

namespace jfa {

using emulator::Site;

constexpr int kWarpThreads = emulator::kWarp;

inline int thread_index() { return emulator::machine().thread(); }
inline int lane_index() { return thread_index() % kWarpThreads; }
// A shuffle on the GPU, so the whole warp must be there.
inline int warp_index(Site site = {}) {
  int none = 0;
  emulator::machine().collective(none, {"warp_index", site}, [](auto&) {});
  return thread_index() / kWarpThreads;
}
inline int block_index() { return emulator::machine().block(); }
inline int grid_blocks() { return emulator::machine().blocks(); }

inline void barrier(Site site = {}) {
  emulator::machine().barrier(0, emulator::machine().threads(), {"barrier", site});
}
inline void warp_barrier(Site site = {}) { emulator::machine().warp_barrier({"warp_barrier", site}); }

template <class T>
inline T shuffle_xor_any(T value, int lane_mask, Site site) {
  struct Operand {
    T value;
    int lane_mask;
    T received;
  } mine = {value, lane_mask, T()};
  emulator::machine().collective(mine, {"shuffle_xor", site}, [](Operand* const(&lanes)[kWarpThreads]) {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      // A source lane outside the warp: the lane keeps its own value.
      const int source = lane ^ lanes[lane]->lane_mask;
      lanes[lane]->received = lanes[source < kWarpThreads ? source : lane]->value;
    }
  });
  return mine.received;
}
inline float shuffle_xor(float value, int lane_mask, Site site = {}) { return shuffle_xor_any(value, lane_mask, site); }
inline uint32_t shuffle_xor(uint32_t value, int lane_mask, Site site = {}) {
  return shuffle_xor_any(value, lane_mask, site);
}
inline uint32_t shuffle_from(uint32_t value, int source, Site site = {}) {
  struct Operand {
    uint32_t value;
    int source;
    uint32_t received;
  } mine = {value, source, 0};
  emulator::machine().collective(mine, {"shuffle_from", site}, [](Operand* const(&lanes)[kWarpThreads]) {
    for (Operand* lane : lanes) lane->received = lanes[lane->source % kWarpThreads]->value;
  });
  return mine.received;
}
inline uint32_t broadcast(uint32_t value, Site site = {}) {
  emulator::machine().collective(value, {"broadcast", site}, [](uint32_t* const(&lanes)[kWarpThreads]) {
    for (uint32_t* lane : lanes) *lane = *lanes[0];
  });
  return value;
}
inline bool any_lane(bool value, Site site = {}) {
  emulator::machine().collective(value, {"any_lane", site}, [](bool* const(&lanes)[kWarpThreads]) {
    bool any = false;
    for (bool* lane : lanes) any = any || *lane;
    for (bool* lane : lanes) *lane = any;
  });
  return value;
}
inline uint32_t lanes_where(bool value, Site site = {}) {
  uint32_t bits = value;
  emulator::machine().collective(bits, {"lanes_where", site}, [](uint32_t* const(&lanes)[kWarpThreads]) {
    uint32_t all = 0;
    for (int n = 0; n < kWarpThreads; ++n) all |= *lanes[n] << n;
    for (uint32_t* lane : lanes) *lane = all;
  });
  return bits;
}
template <class Fold>
inline int fold_over_warp(int value, const char* name, const Site& site, Fold fold) {
  emulator::machine().collective(value, {name, site}, [fold](int* const(&lanes)[kWarpThreads]) {
    int all = *lanes[0];
    for (int n = 1; n < kWarpThreads; ++n) all = fold(all, *lanes[n]);
    for (int* lane : lanes) *lane = all;
  });
  return value;
}
inline int min_over_warp(int value, Site site = {}) {
  return fold_over_warp(value, "min_over_warp", site, [](int a, int b) { return std::min(a, b); });
}
inline int max_over_warp(int value, Site site = {}) {
  return fold_over_warp(value, "max_over_warp", site, [](int a, int b) { return std::max(a, b); });
}
inline int sum_over_warp(int value, Site site = {}) {
  return fold_over_warp(value, "sum_over_warp", site, [](int a, int b) { return int(unsigned(a) + unsigned(b)); });
}
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

template <class Smem>
inline Smem& shared_memory(Site site = {}) {
  static_assert(alignof(Smem) <= 1024, "dynamic shared memory is aligned to 1024 bytes");
  if (sizeof(Smem) > emulator::machine().shared_bytes()) {
    emulator::fail({"shared_memory", site}, "the launch gives less shared memory than the kernel's struct takes");
  }
  return *reinterpret_cast<Smem*>(emulator::SharedMemory::window_begin());
}

inline uint32_t shared_address(const void* pointer, Site site = {}) {
  if (!emulator::SharedMemory::window().contains(pointer)) {
    emulator::fail({"shared_address", site}, "the pointer is not one into shared memory");
  }
  const auto begin = emulator::SharedMemory::window_begin();
  const uint32_t rank = uint32_t(emulator::machine().rank()) << emulator::Machine::kRankShift;
  return rank + emulator::SharedMemory::kBase + uint32_t(static_cast<const unsigned char*>(pointer) - begin);
}

template <class T>
inline T copy_from(const unsigned char* bytes) {
  T value;
  memcpy(&value, bytes, sizeof(T));
  return value;
}

inline float load_shared_f32(uint32_t address, Site site = {}) {
  return copy_from<float>(emulator::machine().read_shared(address, 4, {"load_shared_f32", site}));
}
inline float2 load_shared_f32x2(uint32_t address, Site site = {}) {
  return copy_from<float2>(emulator::machine().read_shared(address, 8, {"load_shared_f32x2", site}));
}
inline float4 load_shared_f32x4(uint32_t address, Site site = {}) {
  return copy_from<float4>(emulator::machine().read_shared(address, 16, {"load_shared_f32x4", site}));
}
inline uint32_t load_shared_32(uint32_t address, Site site = {}) {
  return copy_from<uint32_t>(emulator::machine().read_shared(address, 4, {"load_shared_32", site}));
}
inline uint4 load_shared_128(uint32_t address, Site site = {}) {
  return copy_from<uint4>(emulator::machine().read_shared(address, 16, {"load_shared_128", site}));
}
inline void store_shared_f32(uint32_t address, float value, Site site = {}) {
  memcpy(emulator::machine().write_shared(address, 4, {"store_shared_f32", site}), &value, 4);
}
inline void store_shared_f32x4(uint32_t address, float4 value, Site site = {}) {
  memcpy(emulator::machine().write_shared(address, 16, {"store_shared_f32x4", site}), &value, 16);
}
inline void store_shared_32(uint32_t address, uint32_t value, Site site = {}) {
  memcpy(emulator::machine().write_shared(address, 4, {"store_shared_32", site}), &value, 4);
}
inline void store_shared_128(uint32_t address, uint4 value, Site site = {}) {
  memcpy(emulator::machine().write_shared(address, 16, {"store_shared_128", site}), &value, 16);
}

// One lane's part of ldmatrix.x4: the row it reads for the warp, and the registers it gets.
struct MatrixOperand {
  uint32_t address;
  uint16_t row[8];
  uint32_t r[4];
};

// `addresses` of the rows of four matrices, which an instruction reads or writes.
inline void count_matrices(const uint32_t (&addresses)[kWarpThreads]) {
  emulator::Counters& count = emulator::machine().count();
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows_in_banks[8] = {};  // a row takes four of the 32 banks
    for (int row = 0; row < 8; ++row) ++rows_in_banks[addresses[matrix * 8 + row] / 16 % 8];
    count.matrices += 1;
    count.matrix_wavefronts += *std::max_element(rows_in_banks, rows_in_banks + 8);
  }
}

// Lane 4 g + t gets of each matrix elements (g, 2t) and (g, 2t + 1), of the transposed one (2t, g) and (2t + 1, g).
template <bool kTransposed>
inline void load_matrices(uint32_t (&r)[4], uint32_t address, const emulator::Where& where) {
  MatrixOperand mine;
  mine.address = address;
  memcpy(mine.row, emulator::machine().read_shared(address, 16, where), 16);
  emulator::machine().collective(mine, where, [](MatrixOperand* const(&lanes)[kWarpThreads]) {
    uint32_t addresses[kWarpThreads];
    for (int lane = 0; lane < kWarpThreads; ++lane) addresses[lane] = lanes[lane]->address;
    count_matrices(addresses);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int col) -> uint32_t { return lanes[matrix * 8 + row]->row[col]; };
      for (int lane = 0; lane < kWarpThreads; ++lane) {
        const int g = lane / 4, t = lane % 4;
        lanes[lane]->r[matrix] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                             : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
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

template <class T>
inline T load_global(const T* pointer, Site site = {}) {
  static_assert(sizeof(T) <= 16, "one instruction moves at most 16 bytes");
  return copy_from<T>(emulator::machine().read_global(pointer, sizeof(T), {"load_global", site}));
}
template <class T>
inline void store_global(T* pointer, T value, Site site = {}) {
  static_assert(sizeof(T) <= 16, "one instruction moves at most 16 bytes");
  memcpy(emulator::machine().write_global(pointer, sizeof(T), {"store_global", site}), &value, sizeof(T));
}
inline void store_global_128(void* pointer, uint4 value, Site site = {}) {
  memcpy(emulator::machine().write_global(pointer, 16, {"store_global_128", site}), &value, 16);
}
inline void add_global(float* pointer, float value, Site site = {}) {
  emulator::add_float(emulator::machine().add_global(pointer, 4, {"add_global", site}), value);
}
inline uint32_t increment_global(uint32_t* counter, uint32_t last, Site site = {}) {
  // Blocks on other host threads may do so at the same place.
  auto place = reinterpret_cast<uint32_t*>(emulator::machine().add_global(counter, 4, {"increment_global", site}));
  uint32_t before = __atomic_load_n(place, __ATOMIC_RELAXED), after;
  do {
    after = before >= last ? 0 : before + 1;
  } while (!__atomic_compare_exchange_n(place, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

// Words by which threads tell each other of what they did, blocks on other host threads included. Whoever looks may be
// waiting for others to run.
inline uint64_t load_global_acquire(const uint64_t* pointer, Site site = {}) {
  const emulator::Where where = {"load_global_acquire", site};
  emulator::machine().pause(where);
  const auto place = emulator::machine().add_global(const_cast<uint64_t*>(pointer), 8, where);
  return __atomic_load_n(reinterpret_cast<const uint64_t*>(place), __ATOMIC_ACQUIRE);
}
inline void store_global_release(uint64_t* pointer, uint64_t value, Site site = {}) {
  const auto place = emulator::machine().add_global(pointer, 8, {"store_global_release", site});
  __atomic_store_n(reinterpret_cast<uint64_t*>(place), value, __ATOMIC_RELEASE);
}

inline int opaque(int x) { return x; }
inline void settle(float&) {}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int bits_of(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline int max_of_3(int a, int b, int c) { return std::max(std::max(a, b), c); }

inline float multiply(float a, float b) {
  volatile float product = a * b;  // not fused with what follows
  return product;
}

inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t y = 0;
  for (int n = 0; n < 4; ++n) y |= uint32_t(bytes >> 8 * (selector >> 4 * n & 7) & 0xff) << 8 * n;
  return y;
}
inline uint32_t spread_signs(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t y = 0;
  for (int n = 0; n < 4; ++n) {
    const int byte = selector >> 4 * n & 7;
    const uint32_t sign = (byte < 4 ? a : b) >> (8 * (byte % 4) + 7) & 1;
    y |= (sign * 0xFF) << 8 * n;
  }
  return y;
}

inline float reciprocal_approximate(float x) { return 1.0f / x; }

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz; NaN stays
}

inline float log2_approximate(float x) { return std::log2(x); }

inline float tanh_approximate(float x) {
  const float y = std::tanh(x);
  return y != y ? y : float_of((uint32_t(bits_of(y)) + 0x1000) & ~0x1fffu);  // relative error 2^-11
}

inline float one_minus_square(float x) {
  const float y = std::fma(-x, x, 1.0f);
  return y > 0.0f ? std::min(y, 1.0f) : 0.0f;  // .sat turns NaN into 0
}

}  // namespace jfa
