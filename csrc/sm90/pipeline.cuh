// The ring of places in shared memory between those who load and those who compute.
#pragma once

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
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// One of many arrivals for a warp: what its lanes read before is read.
__device__ __forceinline__ void arrive_for_warp(uint32_t mbarrier) {
  warp_barrier();
  if (lane_index() == 0) mbarrier_arrive(mbarrier);
}

}  // namespace jfa::sm90
