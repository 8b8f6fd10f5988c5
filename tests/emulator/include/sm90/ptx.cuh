// Stands in for csrc/sm90/ptx.cuh: the same functions, carried out by the emulator's machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "common/device.cuh"
#include "mbarrier.h"
#include "sm90/tensor_map.h"
#include "wgmma.h"

namespace jfa::sm90 {

// Of an address of the block's own shared memory, where in it that is.
inline uint32_t local(uint32_t address) { return emulator::machine().local(address); }

// ---- mbarriers

inline void mbarrier_init(uint32_t mbarrier, int arrivals, Site site = {}) {
  emulator::mbarrier_init(local(mbarrier), arrivals, {"mbarrier_init", site});
}
inline void mbarrier_init_fence() { emulator::machine().clocks().fence_init(emulator::machine().running()); }
inline void mbarrier_arrive(uint32_t mbarrier, Site site = {}) {
  emulator::mbarrier_arrive(local(mbarrier), 0, {"mbarrier_arrive", site});
}
inline void mbarrier_arrive_expect(uint32_t mbarrier, int bytes, Site site = {}) {
  emulator::mbarrier_arrive(local(mbarrier), bytes, {"mbarrier_arrive_expect", site});
}
inline void mbarrier_arrive_remote(uint32_t mbarrier, int rank, Site site = {}) {
  emulator::mbarrier_arrive_remote(local(mbarrier), rank, {"mbarrier_arrive_remote", site});
}
inline void mbarrier_wait(uint32_t mbarrier, uint32_t parity, Site site = {}) {
  emulator::mbarrier_wait(local(mbarrier), parity, true, {"mbarrier_wait", site});
}
inline bool mbarrier_test(uint32_t mbarrier, uint32_t parity, Site site = {}) {
  return emulator::mbarrier_wait(local(mbarrier), parity, false, {"mbarrier_test", site});
}

// ---- tensor memory access

inline void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int column, int row, int head, int batch,
                     Site site = {}) {
  const auto own = uint16_t(1 << emulator::machine().rank());
  emulator::tma_load(local(shared), map, local(mbarrier), {column, row, head, batch, 0}, own, {"tma_load", site});
}
inline void tma_load_multicast(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int column, int row, int head,
                               int batch, uint16_t ranks, Site site = {}) {
  emulator::tma_load(local(shared), map, local(mbarrier), {column, row, head, batch, 0}, ranks,
                     {"tma_load_multicast", site});
}
inline void tma_store(const TensorMap& map, uint32_t shared, int column, int row, int head, int batch, Site site = {}) {
  emulator::tma_store(map, local(shared), {column, row, head, batch, 0}, {"tma_store", site});
}
inline void tma_store_commit() { emulator::commit_stores(); }
inline void tma_store_wait_read(Site site = {}) { emulator::wait_for_stores({"tma_store_wait_read", site}); }
inline void tma_store_wait(Site site = {}) { emulator::wait_for_stores({"tma_store_wait", site}); }

// Runs of bytes: multiples of 16, at such addresses.
inline void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t mbarrier, Site site = {}) {
  emulator::bulk_copy(local(shared), global, bytes, local(mbarrier), {"bulk_copy", site});
}
// Adds floats to global memory; committed and waited for as tma_store is.
inline void tma_reduce_add(float* global, uint32_t shared, int bytes, Site site = {}) {
  emulator::bulk_add(global, local(shared), bytes, {"tma_reduce_add", site});
}

inline void fence_async_shared() {
  emulator::Machine& m = emulator::machine();
  m.clocks().fence(m.running());
  ++m.count().proxy_fences;
}

inline void settle_loads(uint32_t) { emulator::machine().clocks().settle_loads(emulator::machine().running()); }
template <int kLoads>
inline void settle_loads(const uint32_t (&)[kLoads][4]) {
  settle_loads(0);
}

inline void add_global_x4(float* pointer, float4 value, Site site = {}) {
  unsigned char* to = emulator::machine().add_global(pointer, 16, {"add_global_x4", site});
  const float terms[4] = {value.x, value.y, value.z, value.w};
  for (int i = 0; i < 4; ++i) emulator::add_float(to + 4 * i, terms[i]);
}

// ---- threads

inline bool elect_one(Site site = {}) {
  int none = 0;
  emulator::machine().collective(none, {"elect_one", site}, [](auto&) {});
  return lane_index() == emulator::machine().leader();
}
template <int kRegisters>
inline void grow_registers(Site site = {}) {
  emulator::set_registers(kRegisters, true, {"grow_registers", site});
}
template <int kRegisters>
inline void shrink_registers(Site site = {}) {
  emulator::set_registers(kRegisters, false, {"shrink_registers", site});
}
inline void named_barrier_sync(int id, int threads, Site site = {}) {
  if (id == 0) emulator::fail({"named_barrier_sync", site}, "barrier 0 is the block's");
  emulator::machine().barrier(id, threads, {"named_barrier_sync", site});
}
inline void named_barrier_arrive(int id, int threads, Site site = {}) {
  if (id == 0) emulator::fail({"named_barrier_arrive", site}, "barrier 0 is the block's");
  emulator::machine().pass_barrier(id, threads, {"named_barrier_arrive", site});
}

// ---- clusters

inline int cluster_rank() { return emulator::machine().rank(); }
inline void cluster_barrier(Site site = {}) { emulator::machine().cluster_barrier({"cluster_barrier", site}); }
inline void store_remote_32(uint32_t shared, uint32_t value, uint32_t mbarrier, int rank, Site site = {}) {
  emulator::store_remote_32(local(shared), value, local(mbarrier), rank, {"store_remote_32", site});
}

// ---- matrices

inline void store_matrix_x4(uint32_t address, const uint32_t (&r)[4], Site site = {}) {
  const emulator::Where where = {"store_matrix_x4", site};
  struct Operand {
    uint32_t address;
    const uint32_t* r;
    unsigned char* row;
  } mine = {address, r, emulator::machine().write_shared(address, 16, where)};
  emulator::machine().collective(mine, where, [](Operand* const(&lanes)[kWarpThreads]) {
    uint32_t addresses[kWarpThreads];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      addresses[lane] = lanes[lane]->address;
      for (int matrix = 0; matrix < 4; ++matrix) {
        memcpy(lanes[matrix * 8 + lane / 4]->row + lane % 4 * 4, &lanes[lane]->r[matrix], 4);
      }
    }
    count_matrices(addresses);
  });
}

// The same, but the two elements of a register go to neighbouring rows.
inline void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4], Site site = {}) {
  const emulator::Where where = {"store_matrix_x4_transposed", site};
  struct Operand {
    uint32_t address;
    const uint32_t* r;
    unsigned char* row;
  } mine = {address, r, emulator::machine().write_shared(address, 16, where)};
  emulator::machine().collective(mine, where, [](Operand* const(&lanes)[kWarpThreads]) {
    uint32_t addresses[kWarpThreads];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      addresses[lane] = lanes[lane]->address;
      for (int n = 0; n < 8; ++n) {
        const uint16_t element = uint16_t(lanes[lane]->r[n / 2] >> 16 * (n % 2));
        memcpy(lanes[n / 2 * 8 + lane % 4 * 2 + n % 2]->row + lane / 4 * 2, &element, 2);
      }
    }
    count_matrices(addresses);
  });
}

inline void wgmma_fence(Site site = {}) { emulator::fence_products({"wgmma_fence", site}); }
inline void wgmma_commit(Site site = {}) { emulator::commit_products({"wgmma_commit", site}); }
template <int kPending>
inline void wgmma_wait(Site site = {}) {
  static_assert(kPending >= 0 && kPending <= 7);
  emulator::wait_for_products(kPending, {"wgmma_wait", site});
}

template <class Element>
constexpr int element_kind() {
  if (std::is_same_v<Element, __half>) return emulator::kHalf;
  if (std::is_same_v<Element, __nv_bfloat16>) return emulator::kBfloat16;
  if (std::is_same_v<Element, __nv_fp8_e4m3>) return emulator::kE4m3;
  static_assert(std::is_same_v<Element, __half> || std::is_same_v<Element, __nv_bfloat16> ||
                std::is_same_v<Element, __nv_fp8_e4m3> || std::is_same_v<Element, __nv_fp8_e5m2>);
  return emulator::kE5m2;
}

// The 16-bit types, and those of 8 bits, of which a product sums 32 and which cannot be transposed.
template <int kN>
struct Wgmma {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);

  template <class Element, bool kTransposedA, bool kTransposedB>
  static void ss(float (&d)[2][kN / 4], uint64_t a, uint64_t b, bool accumulate, Site site = {}) {
    static_assert(sizeof(Element) == 2 || (!kTransposedA && !kTransposedB));
    constexpr int kKind = element_kind<Element>();
    const emulator::ProductForm form = {kN, kKind, kKind, false, kTransposedA, kTransposedB, accumulate, a, b};
    emulator::issue_product(form, order(d), nullptr, {"wgmma", site});
  }
  template <class Element, bool kTransposedB>
  static void rs(float (&d)[2][kN / 4], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = {}) {
    static_assert(sizeof(Element) == 2 || !kTransposedB);
    constexpr int kKind = element_kind<Element>();
    const emulator::ProductForm form = {kN, kKind, kKind, true, false, kTransposedB, accumulate, 0, b};
    emulator::issue_product(form, order(d), a, {"wgmma", site});
  }

 private:
  static float* order(float (&d)[2][kN / 4]) { return &d[0][0]; }
};

}  // namespace jfa::sm90
