// dQ in a fixed order of summation, portable family (deterministic mode):  dQ = scale sum over key tiles of dS K.
//
// One block per (query tile, head, batch entry), which recomputes S and dP of its rows tile by tile, like the forward.
// It costs 7/5 of the products of the accumulating backward, and needs no accumulator.
#pragma once

#include <type_traits>

#include "common/dropout.cuh"
#include "common/schedule.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm80/tile.cuh"
#include "sm80/tiles.h"

namespace jfa::sm80 {

template <int kHeadDim>
struct RecomputeSmem {
  using Shape = RecomputeTile<kHeadDim>;
  Tile<Shape::kQ, kHeadDim> q;
  Tile<Shape::kQ, kHeadDim> d_o;
  Tile<Shape::kK, kHeadDim> k;
  Tile<Shape::kK, kHeadDim> v;
};

// dS of the tiles in shared memory, for this warp's rows from `at` on: before the soft cap, or after it.
template <class Element, bool kBeforeCap, int kHeadDim, bool kGeneral>
__device__ __forceinline__ auto recompute_ds(const RecomputeSmem<kHeadDim>& smem, const Problem& p, const Gradients& g,
                                             const Sequence& sequence, const ScoreRule<kGeneral>& rule, int b, int h,
                                             int warp_tile_row, const Position<>& at) {
  using Shape = RecomputeTile<kHeadDim>;
  constexpr int kRows = Shape::kRowsPerWarp / 8;
  using TileQ = decltype(RecomputeSmem<kHeadDim>::q);
  using TileK = decltype(RecomputeSmem<kHeadDim>::k);
  Fragment<kRows, Shape::kK / 4> s, ds;
  float lse[kRows], delta[kRows];
  load_row_statistics(p, g, sequence, b, h, at, lse, delta);
  s.clear();
  product<Element, kHeadDim>(s, RowOperandA<TileQ>(smem.q, warp_tile_row), RowOperandB<TileK>(smem.k, 0));
  ds.clear();
  product<Element, kHeadDim>(ds, RowOperandA<TileQ>(smem.d_o, warp_tile_row), RowOperandB<TileK>(smem.v, 0));
  std::conditional_t<kBeforeCap, CapSlopes<kRows, Shape::kK / 4>, NoSlopes> slopes;
  rule.apply(s, at, sequence, true, slopes);
  if (has_dropout(p.scores)) {
    probabilities_of_rows<true>(s, rule.factor_log2, lse);
    DropoutBits(p, b, h).template mark<false>(s, at);
    drop_gradients(ds, s, p.scores.dropout.kept);
    gradients_of_rows<true, true>(s, ds, delta);
  } else {
    softmax_gradient<true>(s, ds, rule.factor_log2, lse, delta);
  }
  if constexpr (kBeforeCap) {
    if (p.scores.soft_cap != 0.0f) slopes.multiply_into(ds);
  }
  return ds;
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(RecomputeTile<kHeadDim>::kThreads)
    backward_query(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Shape = RecomputeTile<kHeadDim>;
  using Smem = RecomputeSmem<kHeadDim>;
  constexpr int kRows = Shape::kRowsPerWarp / 8;
  Smem& smem = shared_memory<Smem>();

  const WorkItem item(block_index(), ceil_div(p.shape.q_len, Shape::kQ), p.shape.heads);
  const int b = item.batch;
  const int h = item.head;
  const int h_kv = h / (p.shape.heads / p.shape.kv_heads);
  const Sequence sequence(p, b);
  const int i = item.tile * Shape::kQ;
  const int warp_tile_row = warp_index() * Shape::kRowsPerWarp;
  Interval keys = sequence.keys_of_rows(i, i + Shape::kQ);
  const KeyTiles<Shape::kK> tiles(keys, sequence.sink_keys(), key_alignment(p.scores));
  const Interval rows{0, sequence.q_len};
  const auto looked_at = [&](int j) { return looks_at(keys, sequence.sink_keys(), j); };
  const auto seen_keys = [&](int j) { return looked_at(j) && sequence.is_seen(j); };
  const ScoreRule<true> rule(p.scores, b, h);

  load_tile<decltype(smem.q), Shape::kThreads>(smem.q, head_of(p.q, b, h), p.q.row_stride, i, rows, p.shape.head_dim);
  load_tile<decltype(smem.q), Shape::kThreads>(smem.d_o, head_of(g.d_o, b, h), g.d_o.row_stride, i, rows,
                                               p.shape.value_dim);
  copy_async_commit();
  Fragment<kRows, kHeadDim / 4> dq;
  dq.clear();
#pragma unroll 1
  for (int j = tiles.first; j < keys.end; j = tiles.next(j)) {
    load_tile<decltype(smem.k), Shape::kThreads>(smem.k, head_of(p.k, b, h_kv), p.k.row_stride, j, seen_keys,
                                                 p.shape.head_dim);
    load_tile<decltype(smem.k), Shape::kThreads>(smem.v, head_of(p.v, b, h_kv), p.v.row_stride, j, looked_at,
                                                 p.shape.value_dim);
    copy_async_commit();
    copy_async_wait<0>();
    barrier();  // the tiles have landed for all
    const auto ds =
        recompute_ds<Element, true>(smem, p, g, sequence, rule, b, h, warp_tile_row, Position<>(i + warp_tile_row, j));
    product<Element, Shape::kK>(dq, FragmentOperandA<Element, kRows, Shape::kK / 4>{ds},
                                ColumnOperandB<decltype(Smem::k)>(smem.k, 0));
    barrier();  // K and V are read no more
  }

  copy_async_wait<0>();
  barrier();  // nor is Q written any more, if there was no key
#pragma unroll
  for (int r = 0; r < kRows; ++r) dq.scale_row(r, rule.scale);
  store_fragment<Element>(smem.q, dq, Position<>(warp_tile_row, 0));
  warp_barrier();
  store_rows(smem.q, warp_tile_row, warp_tile_row + Shape::kRowsPerWarp, lane_index(), kWarpThreads,
             head_of(g.dq, b, h), g.dq.row_stride, i, p.shape.q_len, p.shape.head_dim);
}

}  // namespace jfa::sm80
