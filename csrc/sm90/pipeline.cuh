// The ring of places in shared memory between those who load and those who compute.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "sm90/ptx.cuh"

namespace jfa::sm90 {

// A place in a ring of kSlots, and how often the ring has been passed: the parity of an mbarrier's phase. A role that
// waits for places to be filled starts with parity 0; one that waits for them to be free with 1, so that its first
// round does not wait.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  uint32_t parity;

  __device__ __forceinline__ explicit RingPosition(uint32_t first_parity) : parity(first_parity) {}
  // Where the `count`-th fill goes, for roles that count what they take.
  __device__ __forceinline__ static RingPosition of(unsigned count) {
    RingPosition at(count / kSlots % 2);
    at.slot = count % kSlots;
    return at;
  }
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Items of work, structs of ints, on their way through shared memory from the warp that numbers them.
template <class Item>
__device__ __forceinline__ void store_item(uint32_t to, const Item& item) {
  const int* words = reinterpret_cast<const int*>(&item);
#pragma unroll
  for (int n = 0; n < int(sizeof(Item) / 4); ++n) store_shared_32(to + 4 * n, words[n]);
}
template <class Item>
__device__ __forceinline__ Item load_item(uint32_t from) {
  Item item;
  int* words = reinterpret_cast<int*>(&item);
#pragma unroll
  for (int n = 0; n < int(sizeof(Item) / 4); ++n) words[n] = load_shared_32(from + 4 * n);
  return item;
}

// The operand registers of a product that sums over the fragment's columns, rounded.
template <class Element, int kCols>
__device__ __forceinline__ void to_operand(uint32_t (&x)[kCols / 4][4], const Fragment<2, kCols>& s) {
#pragma unroll
  for (int step = 0; step < kCols / 4; ++step) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int c = 4 * step + n / 2 * 2;
      x[step][n] = pack<Element>(s.v[n % 2][c], s.v[n % 2][c + 1]);
    }
  }
}

// One of many arrivals for a warp: what its lanes read before is read.
__device__ __forceinline__ void arrive_for_warp(uint32_t mbarrier) {
  warp_barrier();
  if (lane_index() == 0) mbarrier_arrive(mbarrier);
}

// An arrival of each lane, kWarpThreads for a warp: what this lane read or wrote by itself before is read or written.
// The barrier of the warp above would order that too, but racecheck does not follow it from lane to lane.
__device__ __forceinline__ void arrive_for_lane(uint32_t mbarrier) { mbarrier_arrive(mbarrier); }

}  // namespace jfa::sm90
