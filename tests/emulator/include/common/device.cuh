// Stands in for csrc/common/device.cuh: the same functions, carried out by the emulator's machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

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

inline void barrier(Site site = {}) {
  emulator::machine().barrier(0, emulator::machine().threads(), {"barrier", site});
}
inline void warp_barrier(Site site = {}) { emulator::machine().warp_barrier({"warp_barrier", site}); }

inline float shuffle_xor(float value, int lane_mask, Site site = {}) {
  struct Operand {
    float value;
    int lane_mask;
    float received;
  } mine = {value, lane_mask, 0.0f};
  emulator::machine().collective(mine, {"shuffle_xor", site}, [](Operand* const(&lanes)[kWarpThreads]) {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      // A source lane outside the warp: the lane keeps its own value.
      const int source = lane ^ lanes[lane]->lane_mask;
      lanes[lane]->received = lanes[source < kWarpThreads ? source : lane]->value;
    }
  });
  return mine.received;
}

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
  return emulator::SharedMemory::kBase + uint32_t(static_cast<const unsigned char*>(pointer) - begin);
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
inline uint4 load_shared_128(uint32_t address, Site site = {}) {
  return copy_from<uint4>(emulator::machine().read_shared(address, 16, {"load_shared_128", site}));
}
inline void store_shared_f32(uint32_t address, float value, Site site = {}) {
  memcpy(emulator::machine().write_shared(address, 4, {"store_shared_f32", site}), &value, 4);
}
inline void store_shared_32(uint32_t address, uint32_t value, Site site = {}) {
  memcpy(emulator::machine().write_shared(address, 4, {"store_shared_32", site}), &value, 4);
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
inline void add_global(float* pointer, float value, Site site = {}) {
  // Blocks on other host threads may add to the same place.
  auto place = reinterpret_cast<uint32_t*>(emulator::machine().add_global(pointer, 4, {"add_global", site}));
  uint32_t before = __atomic_load_n(place, __ATOMIC_RELAXED), after;
  do {
    float sum;
    memcpy(&sum, &before, 4);
    sum += value;
    memcpy(&after, &sum, 4);
  } while (!__atomic_compare_exchange_n(place, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

inline int opaque(int x) { return x; }

inline float multiply(float a, float b) {
  volatile float product = a * b;  // not fused with what follows
  return product;
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz; NaN stays
}

}  // namespace jfa
