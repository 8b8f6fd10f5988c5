// Writes the table of common/sequence.cuh: who sees whom, where that takes more than a formula. It runs before the
// kernels that read it, on the same stream.
//
// One thread a token, query rows first, then keys. What rows see of keys and what sees a key are the same question with
// the sides exchanged: windows, spans and sequences all say who belongs together. Whatever the device's arrays hold,
// every interval lies inside the tensors.
#pragma once

#include "common/math.cuh"
#include "common/segments.cuh"
#include "common/sequence.cuh"
#include "launch.h"
#include "problem.h"

namespace jfa {

constexpr int kVisibilityThreads = 256;

constexpr int kCopiedBegins = 1024;

struct VisibilitySmem {
  int begin[kVisibilityThreads / kTableBlock], end[kVisibilityThreads / kTableBlock];  // of what any of a block sees
  int gap[kVisibilityThreads / kTableBlock];
  int begins[2][kCopiedBegins];  // of packed sequences: of rows, of keys
  IdBlocks ids;                  // of the other side
};

// Where the packed sequences of a batch entry begin, and the last one ends: rows or keys. Empty where none are packed.
class Begins {
 public:
  // All threads of a block. A search asks for one after the other: they are copied before, unless they are too many.
  __device__ __forceinline__ Begins(const VisibilitySmem& smem, const Visibility& v, int b, bool of_rows)
      : count_(v.cu_q == nullptr ? 0 : v.sequences + 1),
        copied_(count_ <= kCopiedBegins),
        global_((of_rows ? v.cu_q : v.cu_k) + int64_t(b) * count_),
        shared_(shared_address(smem.begins[of_rows ? 0 : 1])) {
    for (int n = thread_index(); copied_ && n < count_; n += kVisibilityThreads) {
      store_shared_32(shared_ + 4 * n, load_global(global_ + n));
    }
  }
  __device__ __forceinline__ int operator[](int n) const {
    return copied_ ? int(load_shared_32(shared_ + 4 * n)) : load_global(global_ + n);
  }
  // Which sequence a token belongs to; -1: to none.
  __device__ __forceinline__ int sequence_of(int x) const {
    int low = 0, high = count_;  // the first that begins past x
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if ((*this)[middle] <= x) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < count_ ? low - 1 : -1;
  }

 private:
  int count_;
  bool copied_;
  const int* global_;
  uint32_t shared_;
};

__device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }

// `own` and `others`: of this token's side and of the other.
__device__ __forceinline__ Sight sight_of(const Begins& own, const Begins& others, const Sequence& sequence, int x,
                                          bool is_row) {
  const Visibility& v = sequence.p.visibility;
  Sight sight;
  if (x >= (is_row ? sequence.q_len : sequence.k_len)) return sight;
  Interval within{0, is_row ? sequence.k_len : sequence.q_len};
  sight.offset = v.bottom_right ? sequence.k_len - sequence.q_len : 0;
  if (v.cu_q != nullptr) {
    const int n = own.sequence_of(x);
    if (n < 0) return sight;
    const auto begin_of = [&](const Begins& begins, int m) { return clamp(begins[m], 0, kMaxSequence); };
    within = {begin_of(others, n), min(begin_of(others, n + 1), within.end)};
    const int ahead = begin_of(others, n + v.bottom_right) - begin_of(own, n + v.bottom_right);
    sight.offset = is_row ? ahead : -ahead;
  }
  sight.belongs = true;
  const int to_other = is_row ? sight.offset : -sight.offset;
  const int left = min(v.window_left, kMaxSequence), right = min(v.window_right, kMaxSequence);
  Interval of{x + to_other - (is_row ? left : right), x + to_other + (is_row ? right : left) + 1};
  const int position = is_row ? x + sight.offset : x;
  const int back = is_row ? 0 : -sight.offset;  // from positions to the other side's tokens
  for (int n = 0; n < v.span_count; ++n) {
    const int* at = v.spans + (int64_t(sequence.b) * v.span_count + n) * 2;
    constexpr int kFarthest = 2 * kMaxSequence;  // no position is
    const Interval span{clamp(load_global(at), -kFarthest, kFarthest),
                        clamp(load_global(at + 1), -kFarthest, kFarthest)};
    if (span.contains(position)) of = {min(of.begin, span.begin + back), max(of.end, span.end + back)};
  }
  if (!is_row && x < v.sink_tokens) of.end = within.end;
  of = {max(of.begin, within.begin), min(of.end, within.end)};
  if (is_row && v.sink_tokens > 0) of.begin = min(of.begin, max(of.end, 0));
  if (!of.empty() || (is_row && v.sink_tokens > 0 && of.end > 0)) sight.of = of;
  return sight;
}

// `Family` keeps the families' copies apart: they are compiled for different GPUs. `counter`, if there is one, is that
// of the kernel that follows, and becomes 0 here: clearing it would be a launch more.
template <class Family>
__global__ void __launch_bounds__(kVisibilityThreads, 1)  // without the 1 it has 40 registers, for one id at a time
    prepare_visibility(const __grid_constant__ Problem p, uint32_t* counter) {
  if (counter != nullptr && block_index() == 0 && thread_index() == 0) store_global(counter, 0u);
  const VisibilitySmem& smem = shared_memory<VisibilitySmem>();
  const int q_chunks = ceil_div(p.shape.q_len, kVisibilityThreads);
  const int chunks = q_chunks + ceil_div(p.shape.k_len, kVisibilityThreads);
  const int b = block_index() / chunks;
  const Sequence sequence(p, b);
  const Begins of_rows(smem, p.visibility, b, true), of_keys(smem, p.visibility, b, false);
  if (p.visibility.cu_q != nullptr) barrier();
  const int chunk = block_index() % chunks;
  const bool is_row = chunk < q_chunks;
  const int x = (is_row ? chunk : chunk - q_chunks) * kVisibilityThreads + thread_index();
  const int extent = is_row ? p.shape.q_len : p.shape.k_len;
  Sight sight = is_row ? sight_of(of_rows, of_keys, sequence, x, true) : sight_of(of_keys, of_rows, sequence, x, false);
  if (p.visibility.q_segments != nullptr) {
    const int others = is_row ? p.shape.k_len : p.shape.q_len;
    const int* ids = (is_row ? p.visibility.k_segments : p.visibility.q_segments) + int64_t(b) * others;
    const int* own = (is_row ? p.visibility.q_segments : p.visibility.k_segments) + int64_t(b) * extent;
    const SegmentIds segments(smem.ids, ids, others);
    segments.summarize(kVisibilityThreads);
    segments.narrow(sight, sight.of.empty() ? 0 : load_global(own + x));
  }
  const TableSide side(p, b, is_row);
  const bool in_table = x < ceil_div(extent, kTableTile) * kTableTile;
  const Interval of = sight.of;
  if (in_table) {
    store_global(reinterpret_cast<int4*>(side.token(x)),
                 int4{of.begin, of.end, sight.offset, sight.exact * kSeesAll + sight.belongs * kBelongs});
  }

  Interval all = sight.exact ? of : Interval{0, 0};
  const bool nothing = of.end == 0;
  Interval any = nothing ? Interval{kUnbounded, 0} : of;
  int gap = x < extent && nothing, scattered = !sight.exact;
  for (int step = 1; step < kTableBlock; step *= 2) {
    const auto from = [&](int value) { return int(shuffle_xor(uint32_t(value), step)); };
    all = {max(all.begin, from(all.begin)), min(all.end, from(all.end))};
    any = {min(any.begin, from(any.begin)), max(any.end, from(any.end))};
    gap |= from(gap);
    scattered |= from(scattered);
  }
  if (x % kTableBlock == 0) {
    if (in_table) store_global(reinterpret_cast<int4*>(side.block(x)), int4{all.begin, all.end, scattered, 0});
    const int block = thread_index() / kTableBlock;
    store_shared_32(shared_address(&smem.begin[block]), any.begin);
    store_shared_32(shared_address(&smem.end[block]), any.end);
    store_shared_32(shared_address(&smem.gap[block]), gap);
  }
  barrier();
  if (x % kTableTile != 0 || !in_table) return;
  any = {kUnbounded, 0};
  gap = 0;
  for (int n = 0; n < kTableTile / kTableBlock; ++n) {
    const int block = thread_index() / kTableBlock + n;
    any.begin = min(any.begin, int(load_shared_32(shared_address(&smem.begin[block]))));
    any.end = max(any.end, int(load_shared_32(shared_address(&smem.end[block]))));
    gap |= int(load_shared_32(shared_address(&smem.gap[block])));
  }
  store_global(reinterpret_cast<int4*>(side.tile(x)), int4{any.begin, any.end, gap, 0});
}

template <class Family>
Status launch_prepare_visibility(const Problem& p, cudaStream_t stream, uint32_t* counter = nullptr) {
  if (!needs_table(p.visibility)) return Status::Ok();
  const int64_t blocks = ceil_div(p.shape.q_len, kVisibilityThreads) + ceil_div(p.shape.k_len, kVisibilityThreads);
  return launch("jax_flashattn prepare_visibility", prepare_visibility<Family>,
                Grid{p.shape.batch * blocks, kVisibilityThreads, sizeof(VisibilitySmem)}, stream, p, counter);
}

}  // namespace jfa
