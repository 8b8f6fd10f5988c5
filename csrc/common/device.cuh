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

// All threads of the block; shared memory written before is visible after.
__device__ __forceinline__ void barrier() { __syncthreads(); }

// All threads of the warp; what they wrote before is visible to each other after.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffff, value, lane_mask);
}

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
__device__ __forceinline__ void store_shared_32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
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

// 9.7.13.2 red: adds in the order of arrival, so sums of three or more terms may differ in their last bit between runs.
__device__ __forceinline__ void add_global(float* pointer, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}

// The same number, of which the compiler knows nothing: what is computed from it is computed here, not kept in a
// register from before the loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A product rounded on its own: the compiler does not fuse it with an addition.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }

// 2^x, with 2^-inf = 0 and relative error 2^-22 (9.7.3.21 ex2). exp2f() would spend four instructions on denormals.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace jfa
