// The last kernel of the Hopper backward: dQ from the accumulator that backward() has added to, scaled and rounded. One
// block per (query tile, head, batch entry). The accumulator is in the order of registers, see backward_tiles.h; rows
// are put together in shared memory.
#pragma once

#include "common/scores.cuh"
#include "sm90/backward_work.cuh"

namespace jfa::sm90 {

constexpr int kStoreThreads = 256;

template <class Shape>
struct StoreSmem {
  // Rows are 4 words longer than they need to be: lanes that write a column then use different banks.
  static constexpr int kRowFloats = Shape::kHeadDim + 4;
  alignas(16) float dq[Shape::kQ][kRowFloats];
};

template <class Element, class Shape>
__global__ void __launch_bounds__(kStoreThreads)
    store_dq(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Layout = QueryGradientLayout<Shape>;
  auto& smem = shared_memory<StoreSmem<Shape>>();
  // The last heads come first: they are still in the L2.
  const WorkItem item(grid_blocks() - 1 - block_index(), ceil_div(p.shape.q_len, Shape::kQ), p.shape.heads);
  const int first_row = item.tile * Shape::kQ;
  const int q_len = Sequence(p, item.batch).q_len;
  const float scale = ScoreRule<true>(p.scores, item.batch, item.head).scale;
  const float* tile = dq_tile<Shape>(p, g, item.batch, item.head, first_row);

#pragma unroll 4
  for (int n = thread_index(); n < Layout::kTileFloats / Layout::kLaneFloats; n += kStoreThreads) {
    const float4 v = load_global(reinterpret_cast<const float4*>(tile) + n);
    const int number = n / kWarpThreads;
    const int lane = n % kWarpThreads;
    // As in Fragment and Position: rows and columns of the product, which may be dQ^T.
    const int row = band_of_piece<Layout>(number) * 16 + lane / 4;
    const int col = piece_of_band<Layout>(number) * 8 + lane % 4 * 2;
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int r = row + k / 2 * 8, c = col + k % 2;
      store_shared_f32(shared_address(Layout::kTransposed ? &smem.dq[c][r] : &smem.dq[r][c]), values[k]);
    }
  }
  barrier();

  constexpr int kChunks = Shape::kHeadDim / 4;  // of 8 bytes of the result: a warp's reads use all banks
#pragma unroll 4
  for (int n = thread_index(); n < Shape::kQ * kChunks; n += kStoreThreads) {
    const int row = n / kChunks, col = n % kChunks * 4;
    const int i = first_row + row;
    if (i >= p.shape.q_len || col >= p.shape.head_dim) continue;
    uint2 x{0, 0};
    if (i < q_len) {  // rows past it are zero, not what 0 x NaN made of them
      const float4 v = load_shared_f32x4(shared_address(&smem.dq[row][col]));
      x = {pack<Element>(v.x * scale, v.y * scale), pack<Element>(v.z * scale, v.w * scale)};
    }
    store_global(reinterpret_cast<uint2*>(head_of(g.dq, item.batch, item.head) + i * g.dq.row_stride + col), x);
  }
}

}  // namespace jfa::sm90
