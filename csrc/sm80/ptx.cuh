// The sm_80 instructions of the portable family: one instruction a function, no policy.
// Section numbers are those of the PTX ISA 9.0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jfa::sm80 {

// 9.7.9.25.3 cp.async: 16 bytes from global to shared memory, past the registers and the L1 cache. Where `valid` is
// false nothing is read, wherever `global` points, and the 16 bytes become zero.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Everything this thread copied since its last commit becomes one group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's youngest groups are in flight; a barrier must follow for other threads'
// groups.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 9.7.14.5.14 mma.m16n8k16: d (16x8, f32) += a (16x16) b (16x8). With g = lane / 4 and t = lane % 4:
//   d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..), two elements a register
//   b: (2t.., g) (2t+8.., g)
template <class Element>
__device__ __forceinline__ void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);

template <>
__device__ __forceinline__ void mma<__half>(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace jfa::sm80
