// Forward, portable family:  O = softmax(scale Q K^T + bias, masked) V  and its log-sum-exp.
//
// One block per (query tile, head, batch entry); each warp owns some of its query rows and walks over the keys that the
// tile sees, carrying a running maximum and sum per row (FlashAttention-2, arXiv 2307.08691, algorithm 1).
// Loads run one phase ahead: V comes while Q K^T is computed, the next K while softmax and P V are.
#pragma once

#include "common/dropout.cuh"
#include "common/schedule.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm80/tile.cuh"
#include "sm80/tiles.h"

namespace jfa::sm80 {

template <int kHeadDim>
struct ForwardSmem {
  using Shape = ForwardTile<kHeadDim>;
  Tile<Shape::kQ, kHeadDim> q;  // later the outputs, each warp's in the rows of its own queries
  Tile<Shape::kK, kHeadDim> k;
  Tile<Shape::kK, kHeadDim> v;
};

// The finished rows of this warp. Which they are is worked out anew: kept across the loop, it would cost registers
// there.
template <class Element, bool kGeneral, int kHeadDim, int kRows>
__device__ __forceinline__ void store_output(const Problem& p, const ForwardSmem<kHeadDim>& smem,
                                             const OnlineSoftmax<kRows>& softmax, Fragment<kRows, kHeadDim / 4>& o) {
  using Shape = ForwardTile<kHeadDim>;
  const WorkItem item(opaque(block_index()), ceil_div(p.shape.q_len, Shape::kQ), p.shape.heads);
  const Sequence sequence(p, item.batch);
  const int q_len = sequence.q_len;
  const int tile_row = item.tile * Shape::kQ;
  const int warp_tile_row = opaque(warp_index()) * Shape::kRowsPerWarp;
  const Position<> at(tile_row + warp_tile_row, 0);
  float* lse = p.lse + (int64_t(item.batch) * p.shape.heads + item.head) * p.shape.q_len;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = at.row(r);
    float row_lse;
    const bool has_sink = sees_sink(p.scores.sinks, sequence, i);
    const float sink = has_sink ? sink_log2(p.scores.sinks, item.batch, item.head) : minus_infinity();
    const float inverse = softmax.finish(r, sink, row_lse) * (kGeneral ? p.scores.dropout.kept : 1.0f);
#pragma unroll
    for (int c = 0; c < kHeadDim / 4; ++c) o.v[r][c] = i < q_len ? o.v[r][c] * inverse : 0.0f;
    if (lane_index() % 4 == 0 && i < p.shape.q_len) store_global(lse + i, i < q_len ? row_lse : minus_infinity());
  }
  store_fragment<Element>(smem.q, o, Position<>(warp_tile_row, 0));
  warp_barrier();
  store_rows(smem.q, warp_tile_row, warp_tile_row + Shape::kRowsPerWarp, lane_index(), kWarpThreads,
             head_of(p.o, item.batch, item.head), p.o.row_stride, tile_row, p.shape.q_len, p.shape.value_dim);
}

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(ForwardTile<kHeadDim>::kThreads, ForwardTile<kHeadDim>::kBlocksPerSm)
    forward(const __grid_constant__ Problem p) {
  using Shape = ForwardTile<kHeadDim>;
  using Smem = ForwardSmem<kHeadDim>;
  constexpr int kRows = Shape::kRowsPerWarp / 8;  // of a fragment
  Smem& smem = shared_memory<Smem>();

  const WorkItem item(block_index(), ceil_div(p.shape.q_len, Shape::kQ), p.shape.heads);
  const int b = item.batch;
  const int h = item.head;
  const int h_kv = h / (p.shape.heads / p.shape.kv_heads);
  const uint16_t* k = head_of(p.k, b, h_kv);
  const uint16_t* v = head_of(p.v, b, h_kv);

  const Sequence sequence(p, b, kGeneral);
  const int tile_row = item.tile * Shape::kQ;
  const int warp_tile_row = warp_index() * Shape::kRowsPerWarp;
  const int warp_row = tile_row + warp_tile_row;
  Interval keys = sequence.keys_of_rows(tile_row, tile_row + Shape::kQ);
  const KeyTiles<Shape::kK> tiles(keys, sequence.sink_keys(), key_alignment(p.scores));
  const auto looked_at = [&](int j) { return looks_at(keys, sequence.sink_keys(), j); };
  const auto seen_keys = [&](int j) { return looked_at(j) && sequence.is_seen(j); };
  const Interval unmasked = sequence.keys_of_all_rows(warp_row, warp_row + Shape::kRowsPerWarp);

  const ScoreRule<kGeneral> rule(p.scores, b, h);
  OnlineSoftmax<kRows> softmax(rule.factor_log2);
  Fragment<kRows, kHeadDim / 4> o;
  o.clear();

  const RowOperandA<decltype(smem.q)> q_operand(smem.q, warp_tile_row);
  const RowOperandB<decltype(smem.k)> k_operand(smem.k, 0);
  const ColumnOperandB<decltype(smem.v)> v_operand(smem.v, 0);

  load_tile<decltype(smem.q), Shape::kThreads>(smem.q, head_of(p.q, b, h), p.q.row_stride, tile_row,
                                               Interval{0, sequence.q_len}, p.shape.head_dim);
  if (tiles.first < keys.end) {
    load_tile<decltype(smem.k), Shape::kThreads>(smem.k, k, p.k.row_stride, tiles.first, looked_at, p.shape.head_dim);
  }
  copy_async_commit();

#pragma unroll 1
  for (int j = tiles.first; j < keys.end; j = tiles.next(j)) {
    copy_async_wait<0>();
    barrier();  // K of this tile has landed for all, and no warp reads the previous V any more
    load_tile<decltype(smem.v), Shape::kThreads>(smem.v, v, p.v.row_stride, j, seen_keys, p.shape.value_dim);
    copy_async_commit();

    Fragment<kRows, Shape::kK / 4> s;
    s.clear();
    product<Element, kHeadDim>(s, q_operand, k_operand);

    copy_async_wait<0>();
    barrier();  // V has landed for all, and no warp reads this K any more
    if (const int next = tiles.next(j); next < keys.end) {
      load_tile<decltype(smem.k), Shape::kThreads>(smem.k, k, p.k.row_stride, next, looked_at, p.shape.head_dim);
    }
    copy_async_commit();

    NoSlopes none;
    if (rule.needs_mask(unmasked, j, j + Shape::kK)) rule.apply(s, Position<>(warp_row, j), sequence, true, none);
    softmax.update(s, o);
    if constexpr (kGeneral) {
      if (has_dropout(p.scores)) DropoutBits(p, b, h).drop(s, Position<>(warp_row, j));
    }
    product<Element, Shape::kK>(o, FragmentOperandA<Element, kRows, Shape::kK / 4>{s}, v_operand);
  }

  copy_async_wait<0>();
  barrier();  // the loads are over, even where there was no key: Q's place may be written
  store_output<Element, kGeneral>(p, smem, softmax, o);
}

}  // namespace jfa::sm80
