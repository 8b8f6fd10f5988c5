// The library behind the FFI handlers: one attention call, forward or backward, on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "launch.h"
#include "problem.h"

namespace jfa {

// The GPU a call runs on, as far as the choice of kernels depends on it.
struct Device {
  int compute_capability = 0;       // 90 is 9.0
  int multiprocessors = 132;        // of an H200, where nobody can tell
  int64_t shared_memory_bytes = 0;  // what one block may have
};

// What a call would run. Made without a GPU.
struct Plan {
  std::string family;
  int head_dim = 0;  // compiled; smaller ones are filled up with zeros in shared memory
  int q_tile = 0;
  int k_tile = 0;
  int warps = 0;
  int splits = 1;
  int64_t shared_memory_bytes = 0;
  int64_t scratch_floats = 0;  // depends on no device
  std::string schedule;
  std::string why;
};

// `family` is "auto" or a family's name. Operands' addresses are not looked at, except that optional ones count as
// present when not null.
Status plan_forward(const Problem& p, const std::string& family, const Device& device, Plan& plan);
Status plan_backward(const Problem& p, const Gradients& g, const std::string& family, const Device& device, Plan& plan);

// Enqueue the work on the current device; nothing is allocated and nothing waits. Scratch has plan.scratch_floats
// elements: the forward's holds the counter of work items, the backward's delta and the accumulator of dq, both the
// table of who sees whom where there is one.
Status forward(Problem p, float* scratch, int64_t scratch_floats, const std::string& family, cudaStream_t stream);
Status backward(Problem p, Gradients g, float* scratch, int64_t scratch_floats, const std::string& family,
                cudaStream_t stream);

}  // namespace jfa
