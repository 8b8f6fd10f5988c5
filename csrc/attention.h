// The library behind the FFI handlers: one attention call, forward or backward, on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "launch.h"
#include "problem.h"

namespace jfa {

// What a call would run. Made without a GPU.
struct Plan {
  std::string family;
  int head_dim = 0;  // compiled; smaller ones are filled up with zeros in shared memory
  int q_tile = 0;
  int k_tile = 0;
  int warps = 0;
  int splits = 1;
  int64_t shared_memory_bytes = 0;
  int64_t scratch_floats = 0;  // of the backward: delta, then the accumulator of dq. Depends on no device
  std::string why;
};

// `family` is "auto" or a family's name. Operands' addresses are not looked at, except that bias, mask and device_scale
// count as present when not null. shared_memory_bytes: what the device gives one block.
Status plan_forward(const Problem& p, const std::string& family, int64_t shared_memory_bytes, Plan& plan);
Status plan_backward(const Problem& p, const Gradients& g, const std::string& family, int64_t shared_memory_bytes,
                     Plan& plan);

// Enqueue the work; nothing is allocated and nothing waits. The backward's scratch has plan.scratch_floats elements.
Status forward(const Problem& p, const std::string& family, cudaStream_t stream);
Status backward(const Problem& p, Gradients g, float* scratch, int64_t scratch_floats, const std::string& family,
                cudaStream_t stream);

}  // namespace jfa
