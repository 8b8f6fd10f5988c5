// A small kernel, right or with one bug: shows that each tool, and each check of the driver's own, notices.
#pragma once

#include <string>

#include "buffers.h"
#include "launch.h"

namespace sanitizer {

enum class Bug { kNone, kOobWrite, kUnwritten, kRace, kUninitialisedRead, kBadBarrier };

constexpr int kThreads = 64;  // two warps: what they exchange needs a barrier

// Reverses kThreads numbers through shared memory.
template <Bug kBug>
__global__ void planted(const float* in, const float* unset, float* out) {
  __shared__ float tile[kThreads];
  const int t = threadIdx.x;
  tile[t] = (kBug == Bug::kUninitialisedRead ? unset : in)[t];
  if constexpr (kBug == Bug::kBadBarrier) {
    if (t % 2 == 0) __syncthreads();  // the odd threads of the same warps go on, and end
  } else if constexpr (kBug != Bug::kRace) {
    __syncthreads();
  }
  const float value = tile[kThreads - 1 - t];
  if (kBug != Bug::kUnwritten || t != kThreads - 1) out[t] = value;
  if (kBug == Bug::kOobWrite && t == kThreads - 1) out[kThreads] = value;
}

inline jfa::Status launch_planted(const std::string& bug, cudaStream_t stream, const float* in, const float* unset,
                                  float* out) {
  const auto run = [&](void (*kernel)(const float*, const float*, float*)) {
    return jfa::launch("planted", kernel, jfa::Grid{1, kThreads, 0}, stream, in, unset, out);
  };
  if (bug == "none") return run(planted<Bug::kNone>);
  if (bug == "oob_write") return run(planted<Bug::kOobWrite>);
  if (bug == "unwritten") return run(planted<Bug::kUnwritten>);
  if (bug == "race") return run(planted<Bug::kRace>);
  if (bug == "uninitialised_read") return run(planted<Bug::kUninitialisedRead>);
  if (bug == "bad_barrier") return run(planted<Bug::kBadBarrier>);
  return jfa::Status::InvalidArgument("no bug is called " + bug);
}

inline void run_planted(const std::string& bug, bool guarded, cudaStream_t stream) {
  Bytes numbers(kThreads * sizeof(float));
  for (size_t n = 0; n < numbers.size(); ++n) numbers[n] = static_cast<unsigned char>(n % 64);
  Memory memory(guarded);
  const Buffer* in = memory.input("in", numbers);
  const Buffer* unset = memory.output("unset", kThreads, sizeof(float));
  const Buffer* out = memory.output("out", kThreads, sizeof(float));
  check(launch_planted(bug, stream, in->data<float>(), unset->data<float>(), out->data<float>()));
  check(cudaStreamSynchronize(stream), "running the kernel");
  const bool own_checks_see_it = bug == "none" || bug == "oob_write" || bug == "unwritten";
  if (own_checks_see_it) out->read_written();  // what the other bugs leave in `out` is anything
  memory.check_untouched();
}

}  // namespace sanitizer
