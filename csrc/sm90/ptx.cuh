// The sm_90a instructions of the Hopper family: one instruction a function, no policy.
// Section numbers are those of the PTX ISA 9.0. Shared memory is named by its 32-bit address (shared_address()).
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "sm90/tensor_map.h"

namespace jfa::sm90 {

// ---- mbarriers (9.7.13.15): 8 bytes of shared memory. A phase ends when all its arrivals have come and as many bytes
// have landed as were announced; the next one then begins. Phases alternate in parity, the first one's is 0.

__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
// Makes this thread's mbarrier_init() visible to the asynchronous proxy and, after a cluster barrier, to the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
// Announces bytes of asynchronous copies to this phase, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t mbarrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// Arrives at the mbarrier that lies at the same place in block `rank` of the cluster. It publishes nothing: it is for
// stages that were only read. (With .release.cluster it would be a fence of the whole GPU: 60 % of the speed.)
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t mbarrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(mbarrier),
      "r"(rank)
      : "memory");
}
// Waits until the phase of that parity has ended. What was written before its arrivals and the bytes that it counted
// are then visible to this thread. With JFA_WATCHDOG, a wait of 2^24 attempts, each of which may itself be suspended
// for a while, stops the program with an error; that is for looking into a hang only, since ptxas then serialises
// wgmma.
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
  uint32_t done = 0;
#ifdef JFA_WATCHDOG
  int attempts = 1 << 24;
#endif
  while (true) {
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(mbarrier), "r"(parity)
        : "memory");
    if (done) break;
#ifdef JFA_WATCHDOG
    if (--attempts == 0) __trap();
#endif
  }
}

// Whether that phase has ended; if so, like mbarrier_wait().
__device__ __forceinline__ bool mbarrier_test(uint32_t mbarrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(mbarrier), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- tensor memory access (9.7.9.27): boxes of a tensor map, between global and shared memory. Coordinates (column,
// row, head, batch) count elements; what lies outside the tensor is read as zero and never written.

// Lands in shared memory and completes as many bytes of the mbarrier's phase as the box has, zeros included.
__device__ __forceinline__ void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(&map), "r"(mbarrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// The same into every block of the cluster whose bit is set in `ranks`, at the same place, to the mbarrier there.
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int column,
                                                   int row, int head, int batch, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(&map), "r"(mbarrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(ranks)
      : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, uint32_t shared, int column, int row, int head,
                                          int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}
// This thread's stores since its last commit become one group (9.7.9.25.5).
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all of this thread's groups have read their shared memory, which may then be written again.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Until all of this thread's groups are complete.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's ordinary accesses of shared memory before later asynchronous ones, by TMA or wgmma, of those who
// synchronise with it (9.7.13.4).
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 9.7.13.2 red: four sums at once, at an address of 16 bytes. They are added in the order of arrival.
__device__ __forceinline__ void add_global_x4(float* pointer, float4 v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// ---- threads

// True in one lane of the warp, which must be converged (9.7.13.14). Unlike a test of the lane's index it lets the
// compiler issue TMA without a loop over lanes.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\nselp.u32 %0, 1, 0, elected;\n}"
               : "=r"(elected));
  return elected != 0;
}
// Registers of each thread of the warpgroup (9.7.20.5); growing waits until as many are free.
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Barriers 1 to 15 of the block (9.7.13.1), for `threads` of its threads in whole warps: those that wait, and those
// that only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster (9.7.13.5).
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// Writes 4 bytes at the same place in block `rank` of the cluster, and completes them at the mbarrier there (9.7.9.12).
__device__ __forceinline__ void store_remote_32(uint32_t shared, uint32_t value, uint32_t mbarrier, int rank) {
  asm volatile(
      "{\n.reg .b32 place, phase;\nmapa.shared::cluster.u32 place, %0, %3;\nmapa.shared::cluster.u32 phase, %1, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [place], %2, [phase];\n}" ::"r"(shared),
      "r"(mbarrier), "r"(value), "r"(rank)
      : "memory");
}

// ---- matrices

// 9.7.14.5.16 stmatrix: four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 (16 bytes) of
// matrix l / 8, and of matrix i, in r[i], the two elements (row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1).
__device__ __forceinline__ void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// Until what load_matrix_x4() has loaded is there, so that its place may be given back: an arrival would not wait for
// it, and a fence waits for much more. The vote needs `bits`, made of a register of each load; what it decides does
// nothing. Without the vote lanes could part, and ptxas would then hold the descriptors of all later products in
// registers of each lane.
__device__ __forceinline__ void settle_loads(uint32_t bits) {
  asm volatile(
      "{\n.reg .pred rarely, any;\nsetp.eq.u32 rarely, %0, 0x5bd1e995;\n"
      "vote.sync.any.pred any, rarely, 0xffffffff;\n@any nanosleep.u32 0;\n}" ::"r"(bits)
      : "memory");
}
template <int kLoads>
__device__ __forceinline__ void settle_loads(const uint32_t (&r)[kLoads][4]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) bits ^= r[i][0];
  settle_loads(bits);
}

// The same into the transposed matrices: of matrix i, r[i] becomes (rows 2 (l % 4) and 2 (l % 4) + 1, column l / 4).
__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// wgmma.mma_async (9.7.15): products of a warpgroup, D (64 x N, f32) = A (64 x 16) B (16 x N), plus D if `accumulate`.
// They run until waited for, and until then their registers must not be touched. B, and A in the first form, lie in
// shared memory as a 64-bit descriptor says (shared_matrix.cuh). "Transposed" means that the dimension which is not
// summed over is contiguous.

// Orders register accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit become one group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of the youngest groups are running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// One specialisation per N, written by CMake (cmake/wgmma.cmake), with
//   ss<Element, kTransposedA, kTransposedB>(d, descriptor of A, descriptor of B, accumulate)
//   rs<Element, kTransposedB>(d, A's registers, descriptor of B, accumulate)
// d[r][c] is Fragment<2, N / 4>::v of each warp's 16 rows; A's registers are in the order of mma.m16n8k16.
template <int kN>
struct Wgmma;

}  // namespace jfa::sm90

#include "wgmma_table.cuh"
