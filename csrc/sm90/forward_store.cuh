// The epilogue of the Hopper forward: one warp's 16 finished rows.
#pragma once

#include "common/softmax.cuh"
#include "sm90/forward_work.cuh"
#include "sm90/store_rows.cuh"

namespace jfa::sm90 {

// What becomes of one warp's 16 rows, two of them this thread's.
struct FinishedRows {
  float factor[2];  // to multiply the output by; 0 for rows past q_len
  float lse[2];     // -inf for those
};

// Ends their sums, for the item published at that address. `kept`: what dropout has left is multiplied by it. This
// needs nothing of the last product, and runs beside it. The warp's place for outputs is free afterwards.
template <class Shape>
__device__ __forceinline__ FinishedRows finish_rows(const Problem& p, uint32_t published,
                                                    const LaggingSoftmax<2>& softmax, float kept) {
  const ForwardItem item = load_item<ForwardItem>(published);
  const Position<> at(item.first_row + (warp_index() - 4) * kOutputRows, 0);
  FinishedRows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sink = minus_infinity();
    if (Shape::kAnyVisibility && sees_sink(p.scores.sinks, sequence_of<Shape>(p, item), at.row(r)))
      sink = load_shared_f32(published + kItemSink);
    const float factor = softmax.finish(r, sink, rows.lse[r]) * kept;
    const bool inside = at.row(r) < item.q_len;
    rows.factor[r] = inside ? factor : 0.0f;
    rows.lse[r] = inside ? rows.lse[r] : minus_infinity();
  }
  if constexpr (Shape::kStoreByTma) {
    if (elect_one()) tma_store_wait_read();  // of the previous item
    warp_barrier();
  }
  return rows;
}

// A warp's rows of an item's output, from their place in shared memory.
template <class Output>
__device__ __forceinline__ void copy_rows(uint32_t from, const Tensor& to, const ForwardItem& item, int first_row,
                                          int dim) {
  const int count = min(kOutputRows, item.stop - first_row) * dim / 8;  // pieces of 16 bytes
#pragma unroll 1
  for (int n = lane_index(); n < count; n += kWarpThreads) {
    const int row = n / (dim / 8), piece = n % (dim / 8);
    uint16_t* at = head_of(to, item.batch, item.head) + (first_row + row) * to.row_stride + piece * 8;
    store_global_128(at, load_shared_128(from + Output::offset_bytes(row, piece)));
  }
}

// Writes their outputs and their log-sum-exp, up to the item's last row.
template <class Element, class Shape>
__device__ __forceinline__ void store_output(const ForwardArguments& a, ForwardSmem<Shape>& smem, uint32_t published,
                                             const FinishedRows& rows, Fragment<2, Shape::kValueDim / 4>& o) {
  const Problem& p = a.p;
  const ForwardItem item = load_item<ForwardItem>(published);
  const int warp = warp_index() - 4;  // among those that compute
  const int warp_row = item.first_row + warp * kOutputRows;
  const Position<> at(warp_row, 0);
  if (warp_row + kOutputRows > item.q_len) {  // rows past it are zero, not what 0 x NaN made of them
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (at.row(r) < item.q_len) continue;
#pragma unroll
      for (int c = 0; c < Shape::kValueDim / 4; ++c) o.v[r][c] = 0.0f;
    }
  }
  if constexpr (Shape::kStoreByTma) {
    using Output = typename ForwardSmem<Shape>::Output;
    const uint32_t to = shared_address(smem.staged.output) + warp * Output::kBytes;
#pragma unroll
    for (int block = 0; block < Shape::kValueDim / 16; ++block) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * block + i / 2 * 2;
        words[i] = pack<Element>(o.v[i % 2][c] * rows.factor[i % 2], o.v[i % 2][c + 1] * rows.factor[i % 2]);
      }
      store_matrix_x4(to + Output::offset_bytes(lane_index() % 16, 2 * block + lane_index() / 16), words);
    }
    fence_async_shared();
    warp_barrier();
    if (warp_row + kOutputRows > item.stop && item.stop < p.shape.q_len) {  // TMA would write on
      copy_rows<Output>(to, p.o, item, warp_row, p.shape.value_dim);
    } else if (elect_one()) {
#pragma unroll
      for (int c = 0; c < Output::kChunks; ++c) {
        tma_store(a.o, to + c * Output::kChunkBytes, c * kChunkCols, warp_row, item.head, item.batch);
      }
      tma_store_commit();
    }
  } else {
    store_rows<Element>(o, rows.factor, p.o, item.batch, item.head, warp_row, item.stop, p.shape.value_dim);
  }
  // Last, because the fence above waits for all stores before it.
  float* lse = p.lse + (int64_t(item.batch) * p.shape.heads + item.head) * p.shape.q_len + at.row(0);
  if (lane_index() % 4 == 0 && at.row(0) < item.stop) store_global(lse, rows.lse[0]);
  if (lane_index() % 4 == 0 && at.row(1) < item.stop) store_global(lse + 8, rows.lse[1]);
}

}  // namespace jfa::sm90
