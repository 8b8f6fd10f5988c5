// What a block has under way besides its threads: mbarriers' phases, products of warpgroups, stores of TMA.
// The operations on them are in mbarrier.h, tma.h and wgmma.h.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "clocks.h"
#include "settings.h"

namespace emulator {

struct Mbarrier {
  uint32_t address = 0;
  int agent = 0;        // its bytes, in Clocks: in phase n they land at time n + 1
  int initialiser = 0;  // thread
  uint32_t init_clock = 0;
  int count = 0;                 // arrivals in a phase
  int pending = 0;               // of them still to come
  int64_t bytes = 0;             // announced and not landed; negative: landed early
  int phases = 0;                // ended
  Clocks::Knowledge told;        // by those who arrived, in this phase or before
  Clocks::Knowledge ended_told;  // the same up to the end of the last phase
  std::vector<int> waiting;      // threads; all wait for the current phase
  std::vector<int> waited;       // the last phase that each thread has waited for
};

// What thread 0 of a warpgroup says of a product must be what all the others say.
struct ProductForm {
  int n = 0;
  int type_a = 0, type_b = 0;  // ElementKind
  bool registers_a = false, transposed_a = false, transposed_b = false, accumulate = false;
  uint64_t a = 0, b = 0;  // descriptors

  bool operator==(const ProductForm& o) const {
    return n == o.n && type_a == o.type_a && type_b == o.type_b && registers_a == o.registers_a &&
           transposed_a == o.transposed_a && transposed_b == o.transposed_b && accumulate == o.accumulate && a == o.a &&
           b == o.b;
  }
};

// The registers that one or more running products add to.
struct Accumulator {
  int n = 0;
  int running = 0;                    // products
  float* registers[kWarpgroup] = {};  // n / 2 of each thread; null: it has not come to the first product yet
  std::vector<float> values;          // [64][n]
};

struct Product {
  ProductForm form;
  std::shared_ptr<Accumulator> d;
  int issued = 0;  // by how many of the threads
  const uint32_t* a[kWarpgroup] = {};
  std::array<uint32_t, 4> a_values[kWarpgroup];
  Where where{};
};

struct Warpgroup {
  int agent = 0;  // its reads, in Clocks: product n (from 0) reads at time n + 1
  struct Lane {
    uint32_t issued = 0, waited = 0;  // products
    uint32_t groups = 0;              // committed
    bool fenced = false;              // since the last commit or wait
  };
  std::vector<Lane> lanes = std::vector<Lane>(kWarpgroup);
  std::vector<uint32_t> groups;  // products up to the end of each
  std::deque<Product> running;
  uint32_t done = 0;                                       // products before running.front()
  uint32_t ready = 0;                                      // products that all threads have issued
  std::vector<std::shared_ptr<Accumulator>> accumulators;  // of running products
  struct Waiter {
    int thread;
    uint32_t until;
  };
  std::vector<Waiter> waiting;
};

// A thread's TMA stores; in Clocks store n (from 0) reads at time n + 1.
struct Storer {
  int agent = 0;
  uint32_t issued = 0, committed = 0, read = 0;
};

}  // namespace emulator
