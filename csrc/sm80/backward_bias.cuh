// Gradient of the bias, portable family:  dBias = sum of dS over everything the bias was broadcast along.
//
// One block per tile of the bias. It recomputes dS of every tile of scores that the bias tile was added to, in a fixed
// order, and sums them in registers; what is broadcast along queries or keys is summed at the end. No atomics: the
// result is the same in every run, whatever the shape of the bias.
#pragma once

#include "sm80/backward_query.cuh"

namespace jfa::sm80 {

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(RecomputeTile<kHeadDim>::kThreads)
    backward_bias(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Shape = RecomputeTile<kHeadDim>;
  using Smem = RecomputeSmem<kHeadDim>;
  constexpr int kRows = Shape::kRowsPerWarp / 8;
  constexpr int kCols = Shape::kK / 4;
  static_assert(sizeof(float) * Shape::kQ * Shape::kK <= sizeof(Smem::q) + sizeof(Smem::d_o),
                "the sum takes their place");
  Smem& smem = shared_memory<Smem>();

  const ScoreTensor& out = g.d_bias;
  const BiasTiles<Shape> tiles(p, out);
  const WorkItem plane(block_index() / tiles.count(), 1, out.heads);  // of the bias: its batch entry and head
  const int tile = block_index() % tiles.count();
  const int first_i = tile / tiles.along_k * Shape::kQ;
  const int first_j = tile % tiles.along_k * Shape::kK;
  // A broadcast axis is walked along; of the others this block has one tile, entry or head.
  const Interval rows{first_i, out.q_len == 1 ? p.shape.q_len : min(first_i + Shape::kQ, p.shape.q_len)};
  const Interval cols{first_j, out.k_len == 1 ? p.shape.k_len : min(first_j + Shape::kK, p.shape.k_len)};
  const Interval batch{plane.batch, out.batch == 1 ? p.shape.batch : plane.batch + 1};
  const Interval heads{plane.head, out.heads == 1 ? p.shape.heads : plane.head + 1};

  const int warp_tile_row = warp_index() * Shape::kRowsPerWarp;
  Fragment<kRows, kCols> sum;
  sum.clear();
  for (int b = batch.begin; b < batch.end; ++b) {
    const Sequence sequence(p, b);
    for (int h = heads.begin; h < heads.end; ++h) {
      const int h_kv = h / (p.shape.heads / p.shape.kv_heads);
      const ScoreRule<true> rule(p.scores, b, h);
      for (int i = rows.begin; i < rows.end; i += Shape::kQ) {
        const Interval keys = sequence.keys_of_rows(i, i + Shape::kQ);
        const Interval valid_rows{0, sequence.q_len};
        const int sinks = sequence.sink_keys();
        const auto looked_at = [&](int j) { return looks_at(keys, sinks, j); };
#pragma unroll 1
        for (int j = cols.begin; j < cols.end; j += Shape::kK) {
          if (j >= keys.end || (j + Shape::kK <= keys.begin && j >= sinks)) continue;
          load_tile<decltype(smem.q), Shape::kThreads>(smem.q, head_of(p.q, b, h), p.q.row_stride, i, valid_rows,
                                                       p.shape.head_dim);
          load_tile<decltype(smem.q), Shape::kThreads>(smem.d_o, head_of(g.d_o, b, h), g.d_o.row_stride, i, valid_rows,
                                                       p.shape.value_dim);
          load_tile<decltype(smem.k), Shape::kThreads>(smem.k, head_of(p.k, b, h_kv), p.k.row_stride, j, looked_at,
                                                       p.shape.head_dim);
          load_tile<decltype(smem.k), Shape::kThreads>(smem.v, head_of(p.v, b, h_kv), p.v.row_stride, j, looked_at,
                                                       p.shape.value_dim);
          copy_async_commit();
          copy_async_wait<0>();
          barrier();  // the tiles have landed for all
          const auto ds = recompute_ds<Element, false>(smem, p, g, sequence, rule, b, h, warp_tile_row,
                                                       Position<>(i + warp_tile_row, j));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kCols; ++c) sum.v[r][c] += ds.v[r][c];
          }
          barrier();  // the tiles are read no more
        }
      }
    }
  }

  const uint32_t sums = shared_address(&smem);  // [kQ][kK] f32 where Q and dO were
  const Position<> at(warp_tile_row, 0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) store_shared_f32(sums + (at.row(r) * Shape::kK + at.col(c)) * 4, sum.v[r][c]);
  }
  barrier();
  const int out_rows = out.q_len == 1 ? 1 : Shape::kQ;
  const int out_cols = out.k_len == 1 ? 1 : Shape::kK;
  for (int x = thread_index(); x < out_rows * out_cols; x += Shape::kThreads) {
    const int row = x / out_cols;
    const int col = x % out_cols;
    if (first_i + row >= out.q_len || first_j + col >= out.k_len) continue;
    float total = 0.0f;
    for (int r = row; r < (out.q_len == 1 ? Shape::kQ : row + 1); ++r) {
      for (int c = col; c < (out.k_len == 1 ? Shape::kK : col + 1); ++c) {
        total += load_shared_f32(sums + (r * Shape::kK + c) * 4);
      }
    }
    store_global(static_cast<float*>(out.data) + plane.batch * out.batch_stride + plane.head * out.head_stride +
                     (first_i + row) * out.q_stride + (first_j + col) * out.k_stride,
                 total);
  }
}

}  // namespace jfa::sm80
