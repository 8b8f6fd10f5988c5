// Before a backward:  delta = rowsum(dO o) - dLSE,  the term by which dS = P (dP - delta) leaves the softmax's tangent
// space; a gradient of the log-sum-exp enters here and nowhere else, since d lse / ds = P. And zeros where the backward
// accumulates and counts.
//
// A row is read by as many lanes as it has chunks of 16 bytes, rounded up to a power of two.
#pragma once

#include <algorithm>

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/schedule.cuh"
#include "launch.h"
#include "problem.h"

namespace jfa {

constexpr int kPrepareThreads = 256;
constexpr int64_t kMaxRows = 0x7fffffff;  // 64-bit divisions of every thread would take as long as the memory

// `Family` keeps the families' copies apart: they are compiled for different GPUs.
template <class Element, class Family>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_backward(const __grid_constant__ Problem p, const __grid_constant__ Gradients g, int log_lanes,
                     int words_per_thread) {
  const unsigned rows = unsigned(p.shape.batch) * p.shape.q_len * p.shape.heads;
  // The first heads come last: they are still in the L2 when the backward begins with them.
  const int64_t block = grid_blocks() - 1 - block_index();
  const int64_t thread = block * kPrepareThreads + thread_index();
  for (int k = 0; k < words_per_thread; ++k) {
    const int64_t n = (block * words_per_thread + k) * kPrepareThreads + thread_index();
    if (n < g.cleared_floats / 4) store_global(reinterpret_cast<uint4*>(g.dq_accumulator) + n, uint4{0, 0, 0, 0});
  }
  if (rows == 0) return;
  const unsigned x = thread >> log_lanes;  // (b, i, h), h fastest
  const unsigned token = x / p.shape.heads;
  const int h = x - token * p.shape.heads;
  const int b = token / p.shape.q_len;
  const int i = token - b * p.shape.q_len;
  const int lanes = 1 << log_lanes;
  const int d = thread_index() % lanes * 8;

  float delta = 0.0f;
  if (x < rows && d < p.shape.value_dim) {
    const uint4 o = load_global(reinterpret_cast<const uint4*>(head_of(p.o, b, h) + i * p.o.row_stride + d));
    const uint4 d_o = load_global(reinterpret_cast<const uint4*>(head_of(g.d_o, b, h) + i * g.d_o.row_stride + d));
    const uint32_t o_pairs[4] = {o.x, o.y, o.z, o.w};
    const uint32_t d_o_pairs[4] = {d_o.x, d_o.y, d_o.z, d_o.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 left = unpack<Element>(o_pairs[n]);
      const float2 right = unpack<Element>(d_o_pairs[n]);
      delta += left.x * right.x + left.y * right.y;
    }
  }
  for (int step = 1; step < lanes; step *= 2) delta += shuffle_xor(delta, step);
  if (x < rows && d == 0) {
    const int64_t at = (int64_t(b) * p.shape.heads + h) * p.shape.q_len + i;
    store_global(g.delta + at, g.d_lse == nullptr ? delta : delta - load_global(g.d_lse + at));
  }
}

template <class Element, class Family>
Status launch_prepare_backward(const Problem& p, const Gradients& g, cudaStream_t stream) {
  int log_lanes = 0;
  while (8 << log_lanes < p.shape.value_dim) ++log_lanes;
  const int64_t rows = int64_t(p.shape.batch) * p.shape.q_len * p.shape.heads;
  if (rows > kMaxRows) {
    return Status::Unimplemented("batch x heads x query length is " + std::to_string(rows) + "; the backward takes " +
                                 std::to_string(kMaxRows));
  }
  const int64_t blocks = std::max<int64_t>(((rows << log_lanes) + kPrepareThreads - 1) / kPrepareThreads, 1);
  const int64_t threads = blocks * kPrepareThreads;
  const int words_per_thread = static_cast<int>((g.cleared_floats / 4 + threads - 1) / threads);
  return launch("jax_flashattn prepare_backward", prepare_backward<Element, Family>, Grid{blocks, kPrepareThreads, 0},
                stream, p, g, log_lanes, words_per_thread);
}

}  // namespace jfa
