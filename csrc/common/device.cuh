// The machine as the kernels see it: who am I, barriers, shuffles, memory. Every access a kernel makes goes through
// this header or a family's ptx.cuh, so that a test can replace the two by functional models and run a kernel on a CPU.
// Section numbers are those of the PTX ISA 9.0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jfa {

constexpr int kWarpThreads = 32;

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpThreads; }
// The same in all lanes, and known to be so by the compiler: branches and addresses made from it stay uniform.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffff, threadIdx.x / kWarpThreads, 0); }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int grid_blocks() { return gridDim.x; }

// All threads of the block; shared memory written before is visible after.
__device__ __forceinline__ void barrier() { __syncthreads(); }

// All threads of the warp; what they wrote before is visible to each other after.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffff, value, lane_mask);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xffffffff, value, lane_mask);
}
// What lane `source` has.
__device__ __forceinline__ uint32_t shuffle_from(uint32_t value, int source) {
  return __shfl_sync(0xffffffff, value, source);
}
// Lane 0's value, in all lanes and known to be the same in all.
__device__ __forceinline__ uint32_t broadcast(uint32_t value) { return __shfl_sync(0xffffffff, value, 0); }
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(0xffffffff, value); }
__device__ __forceinline__ uint32_t lanes_where(bool value) { return __ballot_sync(0xffffffff, value); }
__device__ __forceinline__ int min_over_warp(int value) { return __reduce_min_sync(0xffffffff, value); }
__device__ __forceinline__ int max_over_warp(int value) { return __reduce_max_sync(0xffffffff, value); }
__device__ __forceinline__ int sum_over_warp(int value) { return __reduce_add_sync(0xffffffff, value); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }

// The block's dynamic shared memory as a struct, the picture of it.
template <class Smem>
__device__ __forceinline__ Smem& shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Smem*>(bytes);
}

// The 32-bit address of shared memory that ld.shared and its kin take (section 5.1).
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 9.7.9.8 ld.shared, 9.7.9.11 st.shared
__device__ __forceinline__ float load_shared_f32(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ float2 load_shared_f32x2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_shared_f32x4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint4 load_shared_128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_f32(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void store_shared_f32x4(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_shared_32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_128(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// 9.7.14.5.15 ldmatrix: four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 (16 bytes) of
// matrix l / 8; it gets of matrix i, in r[i], the two elements (row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1).
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of the transposed matrices: lane l gets (rows 2 (l % 4) and 2 (l % 4) + 1, column l / 4).
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Global memory. T is a scalar or a vector type of at most 16 bytes, aligned to its size.
template <class T>
__device__ __forceinline__ T load_global(const T* pointer) {
  return *pointer;
}
template <class T>
__device__ __forceinline__ void store_global(T* pointer, T value) {
  *pointer = value;
}

// 9.7.9.11 st.global: unlike store_global() it stays between the volatile instructions around it. Where a thread stores
// all its registers, the compiler otherwise prepares too much at once and spills.
__device__ __forceinline__ void store_global_128(void* pointer, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// 9.7.13.2 red: adds in the order of arrival, so sums of three or more terms may differ in their last bit between runs.
__device__ __forceinline__ void add_global(float* pointer, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}

// 9.7.13.2 atom.inc: adds 1, but turns `last` into 0. Returns what was there before.
__device__ __forceinline__ uint32_t increment_global(uint32_t* counter, uint32_t last) {
  return atomicInc(counter, last);
}

// 9.7.9.8 ld.acquire, 9.7.9.11 st.release: what was written and added before the store, by this thread or by others
// that it had waited for, comes before what is after a load that sees it, on any multiprocessor.
__device__ __forceinline__ uint64_t load_global_acquire(const uint64_t* pointer) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
  return value;
}
__device__ __forceinline__ void store_global_release(uint64_t* pointer, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

// The same number, of which the compiler knows nothing: what is computed from it is computed here, not kept in a
// register from before the loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The same number, computed by now: before the volatile instructions that follow, not where it is used.
__device__ __forceinline__ void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// A product rounded on its own: the compiler does not fuse it with an addition.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }

__device__ __forceinline__ int bits_of(float x) { return __float_as_int(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
// One instruction since sm_90.
__device__ __forceinline__ int max_of_3(int a, int b, int c) { return __vimax3_s32(a, b, c); }

// 9.7.9.7 prmt: each byte of the result becomes 0xFF or 0, as the highest bit is of the byte that its nibble of
// `selector` names: 0 to 3 of a, 4 to 7 of b.
__device__ __forceinline__ uint32_t spread_signs(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector | 0x8888));
  return y;
}

// 9.7.9.7 prmt: byte n of the result is the one that nibble n of `selector` names: 0 to 3 of a, 4 to 7 of b.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// 1 / x with relative error 2^-23, for normal x (9.7.3.15 rcp). A division would call a function for the other x.
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x, with 2^-inf = 0 and relative error 2^-22 (9.7.3.21 ex2). exp2f() would spend four instructions on denormals.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), with an absolute error of 2^-22 for x in [0.5, 2], relative elsewhere; -inf of 0 (9.7.3.20 lg2). log2f() is
// a chain of some thirty instructions, on which the end of a row would wait.
__device__ __forceinline__ float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// With relative error 2^-11 (9.7.3.22 tanh): one instruction of the unit that also computes exponentials.
__device__ __forceinline__ float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 - x^2, kept within [0, 1]; NaN becomes 0 (9.7.3.6 fma, with .sat).
__device__ __forceinline__ float one_minus_square(float x) {
  float y;
  asm("fma.rn.sat.f32 %0, %1, %2, 0f3F800000;" : "=f"(y) : "f"(-x), "f"(x));
  return y;
}

}  // namespace jfa
