// The epilogue of the Hopper forward: one warp's 16 finished rows.
#pragma once

#include "common/softmax.cuh"
#include "sm90/forward_work.cuh"
#include "sm90/store_rows.cuh"

namespace jfa::sm90 {

// Writes one warp's 16 finished rows, of the item published at that address, times `factor`. lse is written for rows
// inside the tensor, with -inf for those past q_len.
template <class Element, class Shape>
__device__ __forceinline__ void store_output(const ForwardArguments& a, ForwardSmem<Shape>& smem, uint32_t published,
                                             const LaggingSoftmax<2>& softmax, Fragment<2, Shape::kValueDim / 4>& o,
                                             float factor) {
  const Problem& p = a.p;
  const ForwardItem item = load_item<ForwardItem>(published);
  const int warp = thread_index() / kWarpThreads - 4;  // among those that compute
  const int warp_row = item.first_row + warp * kOutputRows;
  const Position<> at(warp_row, 0);
  float inverse[2], lse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sink = minus_infinity();
    if (Shape::kAnyVisibility && sees_sink(p.scores.sinks, sequence_of<Shape>(p, item), at.row(r)))
      sink = load_shared_f32(published + kItemSink);
    inverse[r] = softmax.finish(r, sink, lse[r]) * factor;
  }
  if (warp_row + kOutputRows > item.q_len) {  // rows past it are zero, not what 0 x NaN made of them
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (at.row(r) < item.q_len) continue;
      inverse[r] = 0.0f;
#pragma unroll
      for (int c = 0; c < Shape::kValueDim / 4; ++c) o.v[r][c] = 0.0f;
    }
  }
  if constexpr (Shape::kStoreByTma) {
    using Output = typename ForwardSmem<Shape>::Output;
    const uint32_t to = shared_address(smem.staged.output) + warp * Output::kBytes;
    if (elect_one()) tma_store_wait_read();  // of the previous item
    warp_barrier();
#pragma unroll
    for (int block = 0; block < Shape::kValueDim / 16; ++block) {
      uint32_t rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * block + i / 2 * 2;
        rows[i] = pack<Element>(o.v[i % 2][c] * inverse[i % 2], o.v[i % 2][c + 1] * inverse[i % 2]);
      }
      store_matrix_x4(to + Output::offset_bytes(lane_index() % 16, 2 * block + lane_index() / 16), rows);
    }
    fence_async_shared();
    warp_barrier();
    if (elect_one()) {
#pragma unroll
      for (int c = 0; c < Output::kChunks; ++c) {
        tma_store(a.o, to + c * Output::kChunkBytes, c * kChunkCols, warp_row, item.head, item.batch);
      }
      tma_store_commit();
    }
  } else {
    store_rows<Element>(o, inverse, p.o, item.batch, item.head, warp_row, p.shape.q_len, p.shape.value_dim);
  }
  // Last, because the fence above waits for all stores before it.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = at.row(r);
    if (lane_index() % 4 != 0 || i >= p.shape.q_len) continue;
    const int64_t row = (int64_t(item.batch) * p.shape.heads + item.head) * p.shape.q_len + i;
    store_global(p.lse + row, i < item.q_len ? lse[r] : minus_infinity());
  }
}

}  // namespace jfa::sm90
