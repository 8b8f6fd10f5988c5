// What moves between global and shared memory by itself: boxes of tensors (TMA), and plain runs of bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "fault.h"

namespace emulator {

// Of the 16-byte chunk that would lie at `address` without a swizzle of rows of `span` bytes (128, 64, 32; 0: none).
inline uint32_t swizzled(uint32_t address, int span) {
  const uint32_t mask = span == 0 ? 0 : span / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// What a CUtensorMap says; of up to five dimensions, the contiguous one first.
struct TensorMap {
  unsigned char* base = nullptr;
  uint64_t strides[4] = {};  // bytes, of dimensions 1 to 4
  uint32_t extents[5] = {};
  uint16_t box[5] = {};
  uint16_t element_bytes = 0, rank = 0, swizzle = 0;

  int box_bytes() const {
    int bytes = element_bytes;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};
static_assert(sizeof(TensorMap) <= 128, "as large as a CUtensorMap at most");

// Why cuTensorMapEncodeTiled would refuse a map; empty if it would not.
std::string why_refused(const TensorMap& map);

void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, const int (&at)[5], uint16_t ranks,
              const Where& where);
// What lies outside the tensor may hold anything.
void tma_store(const TensorMap& map, uint32_t shared, const int (&at)[5], const Where& where);

// A run of bytes without a map.
void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t mbarrier, const Where& where);
// Adds a run of floats in shared memory to as many in global memory.
void bulk_add(float* global, uint32_t shared, int bytes, const Where& where);
void store_remote_32(uint32_t shared, uint32_t value, uint32_t mbarrier, int rank, const Where& where);

void commit_stores();
// Until the thread's groups have read what they store; this thread may then write there again, and those it tells.
void wait_for_stores(const Where& where);

// Adds `value` to a float that other host threads may be adding to.
inline void add_float(unsigned char* place, float value) {
  auto bits = reinterpret_cast<uint32_t*>(place);
  uint32_t before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
  do {
    float sum;
    memcpy(&sum, &before, 4);
    sum += value;
    memcpy(&after, &sum, 4);
  } while (!__atomic_compare_exchange_n(bits, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

}  // namespace emulator
