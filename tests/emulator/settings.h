// What a launch is, and what is counted in it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

struct Launch {
  int blocks = 1;
  int threads = kWarp;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks
  uint64_t seed = 1;
  int host_threads = 1;
};

struct Counters {
  uint64_t switches = 0;            // of fibers
  uint64_t products = 0;            // mma instructions
  uint64_t matrices = 0;            // 8 x 8 matrices read by ldmatrix or written by stmatrix
  uint64_t matrix_wavefronts = 0;   // passes over the banks they took; without conflicts as many
  uint64_t warpgroup_products = 0;  // wgmma instructions
  uint64_t tma_bytes = 0;           // of whole boxes, each multicast counted once
  uint64_t proxy_fences = 0;        // by how many threads

  void add(const Counters& other) {
    switches += other.switches;
    products += other.products;
    matrices += other.matrices;
    matrix_wavefronts += other.matrix_wavefronts;
    warpgroup_products += other.warpgroup_products;
    tma_bytes += other.tma_bytes;
    proxy_fences += other.proxy_fences;
  }
};

}  // namespace emulator
