// Backward, portable family:  with P = exp(S - lse) recomputed,
//   dV = P^T dO,   dS = P (dO V^T - delta),   dK = scale dS^T Q,   dQ = scale dS K      (FlashAttention-2, algorithm 2)
//
// One block per (key tile, key/value head, batch entry). It keeps K, V, dK and dV, and passes over the query tiles that
// see its keys, for each query head of the group in turn: dK and dV need no sum outside the block. Its part of dQ is
// added to an f32 accumulator in device memory, in the order of the threads' registers; store_dq() sums nothing more,
// it scales, rounds and puts rows in order. In deterministic mode backward_query() computes dQ instead.
#pragma once

#include "common/dropout.cuh"
#include "common/schedule.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm80/tile.cuh"
#include "sm80/tiles.h"

namespace jfa::sm80 {

template <int kHeadDim>
struct BackwardSmem {
  using Shape = BackwardTile<kHeadDim>;
  Tile<Shape::kK, kHeadDim> k;  // later dK
  Tile<Shape::kK, kHeadDim> v;  // later dV
  Tile<Shape::kQ, kHeadDim> q[2];
  Tile<Shape::kQ, kHeadDim> d_o;
  Tile<Shape::kQ, Shape::kK> p;
  Tile<Shape::kQ, Shape::kK> ds;
};

// How the warps share the products, and what each holds of them.
template <int kHeadDim>
struct BackwardLayout {
  using Shape = BackwardTile<kHeadDim>;
  static constexpr int kScoreAcross = Shape::kWarps / Shape::kScoreDown;
  static constexpr int kKeyAcross = Shape::kWarps / Shape::kKeyDown;
  static constexpr int kQueryAcross = Shape::kWarps / Shape::kQueryDown;
  static constexpr int kScoreRows = Shape::kQ / Shape::kScoreDown;
  static constexpr int kScoreCols = Shape::kK / kScoreAcross;
  static constexpr int kKeyRows = Shape::kK / Shape::kKeyDown;
  static constexpr int kQueryRows = Shape::kQ / Shape::kQueryDown;
  using ScoreFragment = Fragment<kScoreRows / 8, kScoreCols / 4>;
  using KeyFragment = Fragment<kKeyRows / 8, kHeadDim / kKeyAcross / 4>;
  using QueryFragment = Fragment<kQueryRows / 8, kHeadDim / kQueryAcross / 4>;
};

// Where a block's threads keep their registers of one tile of dQ: register n of a thread at [n * kThreads].
template <class Shape, int kHeadDim>
__device__ __forceinline__ float* dq_slots(const Problem& p, const Gradients& g, int b, int h, int row) {
  const int64_t tile = (int64_t(b) * p.shape.heads + h) * ceil_div(p.shape.q_len, Shape::kQ) + row / Shape::kQ;
  return g.dq_accumulator + tile * (Shape::kQ * kHeadDim) + thread_index();
}

// The finished dK and dV of this block. Which they are is worked out anew: kept across the loop, it would cost
// registers there.
template <class Element, int kHeadDim, bool kGeneral>
__device__ __forceinline__ void store_key_gradients(const Problem& p, const Gradients& g,
                                                    const BackwardSmem<kHeadDim>& smem,
                                                    typename BackwardLayout<kHeadDim>::KeyFragment& dk,
                                                    typename BackwardLayout<kHeadDim>::KeyFragment& dv) {
  using Shape = BackwardTile<kHeadDim>;
  using Layout = BackwardLayout<kHeadDim>;
  const WorkItem item(opaque(block_index()), ceil_div(p.shape.k_len, Shape::kK), p.shape.kv_heads,
                      TileOrder::kFirstFirst);
  const int warp = opaque(warp_index());
  const float scale = ScoreRule<kGeneral>(p.scores, item.batch, 0).scale;
#pragma unroll
  for (int r = 0; r < dk.kRows; ++r) {
    dk.scale_row(r, scale);
    if (kGeneral) dv.scale_row(r, p.scores.dropout.kept);
  }
  const Position<Layout::kKeyAcross> at(warp / Layout::kKeyAcross * Layout::kKeyRows, warp % Layout::kKeyAcross * 16);
  store_fragment<Element>(smem.k, dk, at);
  store_fragment<Element>(smem.v, dv, at);
  barrier();
  const int j = item.tile * Shape::kK;
  store_rows(smem.k, 0, Shape::kK, thread_index(), Shape::kThreads, head_of(g.dk, item.batch, item.head),
             g.dk.row_stride, j, p.shape.k_len, p.shape.head_dim);
  store_rows(smem.v, 0, Shape::kK, thread_index(), Shape::kThreads, head_of(g.dv, item.batch, item.head),
             g.dv.row_stride, j, p.shape.k_len, p.shape.value_dim);
}

template <class Element, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(BackwardTile<kHeadDim>::kThreads, BackwardTile<kHeadDim>::kBlocksPerSm)
    backward(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Shape = BackwardTile<kHeadDim>;
  using Layout = BackwardLayout<kHeadDim>;
  using Smem = BackwardSmem<kHeadDim>;
  using TileK = decltype(Smem::k);
  using TileQ = decltype(Smem::d_o);
  using TileS = decltype(Smem::p);
  constexpr int kThreads = Shape::kThreads;
  Smem& smem = shared_memory<Smem>();

  const WorkItem item(block_index(), ceil_div(p.shape.k_len, Shape::kK), p.shape.kv_heads, TileOrder::kFirstFirst);
  const int b = item.batch;
  const int group = p.shape.heads / p.shape.kv_heads;
  const int j = item.tile * Shape::kK;
  const Sequence sequence(p, b, kGeneral);
  const Interval rows = sequence.rows_of_keys(j, j + Shape::kK);
  const int first_tile = rows.begin / Shape::kQ;  // dQ tiles lie on one grid for all blocks
  const int tiles = rows.empty() ? 0 : ceil_div(rows.end, Shape::kQ) - first_tile;

  const int warp = warp_index();
  const int score_row = warp / Layout::kScoreAcross * Layout::kScoreRows;
  const int score_col = warp % Layout::kScoreAcross * Layout::kScoreCols;
  const int key_row = warp / Layout::kKeyAcross * Layout::kKeyRows;
  const int key_col = warp % Layout::kKeyAcross * 16;
  const int query_row = warp / Layout::kQueryAcross * Layout::kQueryRows;
  const int query_col = warp % Layout::kQueryAcross * 16;

  const auto seeing_rows = [&](int i) { return rows.contains(i) && sequence.sees(i); };
  const auto load_q = [&](int n, int stage) {
    load_tile<TileQ, kThreads>(smem.q[stage], head_of(p.q, b, item.head * group + n / tiles), p.q.row_stride,
                               (first_tile + n % tiles) * Shape::kQ, seeing_rows, p.shape.head_dim);
  };
  const auto load_d_o = [&](int n) {
    load_tile<TileQ, kThreads>(smem.d_o, head_of(g.d_o, b, item.head * group + n / tiles), g.d_o.row_stride,
                               (first_tile + n % tiles) * Shape::kQ, seeing_rows, p.shape.value_dim);
  };
  const Interval keys{j, sequence.k_len};
  const auto seen_keys = [&](int key) { return keys.contains(key) && sequence.is_seen(key); };
  load_tile<TileK, kThreads>(smem.k, head_of(p.k, b, item.head), p.k.row_stride, j, seen_keys, p.shape.head_dim);
  load_tile<TileK, kThreads>(smem.v, head_of(p.v, b, item.head), p.v.row_stride, j, keys, p.shape.value_dim);
  if (tiles > 0) {
    load_q(0, 0);
    load_d_o(0);
  }
  copy_async_commit();

  typename Layout::KeyFragment dk, dv;
  dk.clear();
  dv.clear();

#pragma unroll 1
  for (int n = 0; n < group * tiles; ++n) {
    const int stage = n % 2;
    const int h = item.head * group + n / tiles;
    const int i = (first_tile + n % tiles) * Shape::kQ;
    const ScoreRule<kGeneral> rule(p.scores, b, h);
    const bool more = n + 1 < group * tiles;

    copy_async_wait<0>();
    barrier();  // this Q and dO have landed for all; the previous Q, P and dS are read no more
    if (more) load_q(n + 1, 1 - stage);
    copy_async_commit();

    typename Layout::ScoreFragment s, ds;  // ds holds dP first
    const Position<> at(i + score_row, j + score_col);
    float lse[Layout::kScoreRows / 8], delta[Layout::kScoreRows / 8];
    load_row_statistics(p, g, sequence, b, h, at, lse, delta);
    s.clear();
    product<Element, kHeadDim>(s, RowOperandA<TileQ>(smem.q[stage], score_row), RowOperandB<TileK>(smem.k, score_col));
    ds.clear();
    product<Element, kHeadDim>(ds, RowOperandA<TileQ>(smem.d_o, score_row), RowOperandB<TileK>(smem.v, score_col));

    const Interval unmasked = sequence.keys_of_all_rows(i + score_row, i + score_row + Layout::kScoreRows);
    if (rule.needs_mask(unmasked, j + score_col, j + score_col + Layout::kScoreCols)) {
      CapSlopes<Layout::kScoreRows / 8, Layout::kScoreCols / 4> slopes;
      rule.apply(s, at, sequence, true, slopes);
      if (kGeneral && has_dropout(p.scores)) {
        probabilities_of_rows<true>(s, rule.factor_log2, lse);
        DropoutBits(p, b, h).template mark<false>(s, at);
        drop_gradients(ds, s, p.scores.dropout.kept);
        gradients_of_rows<true, true>(s, ds, delta);
        clear_marked(s);
      } else {
        softmax_gradient<true>(s, ds, rule.factor_log2, lse, delta);
      }
      if (kGeneral && p.scores.soft_cap != 0.0f) slopes.multiply_into(ds);
    } else {
      softmax_gradient<false>(s, ds, rule.factor_log2, lse, delta);
    }
    store_fragment<Element>(smem.p, s, Position<>(score_row, score_col));
    store_fragment<Element>(smem.ds, ds, Position<>(score_row, score_col));
    barrier();  // P and dS are complete

    product<Element, Shape::kQ>(dv, ColumnOperandA<TileS>(smem.p, key_row),
                                ColumnOperandB<TileQ, Layout::kKeyAcross>(smem.d_o, key_col));
    barrier();  // dO is read no more
    if (more) load_d_o(n + 1);
    copy_async_commit();

    if (!g.deterministic) {
      typename Layout::QueryFragment dq;
      dq.clear();
      product<Element, Shape::kK>(dq, RowOperandA<TileS>(smem.ds, query_row),
                                  ColumnOperandB<TileK, Layout::kQueryAcross>(smem.k, query_col));
      float* slots = dq_slots<Shape, kHeadDim>(p, g, b, h, i);
#pragma unroll
      for (int r = 0; r < dq.kRows; ++r) {
#pragma unroll
        for (int c = 0; c < dq.kCols; ++c) add_global(slots + (r * dq.kCols + c) * kThreads, dq.v[r][c]);
      }
    }
    product<Element, Shape::kQ>(dk, ColumnOperandA<TileS>(smem.ds, key_row),
                                ColumnOperandB<TileQ, Layout::kKeyAcross>(smem.q[stage], key_col));
  }

  copy_async_wait<0>();
  barrier();  // K and V are read no more
  store_key_gradients<Element, kHeadDim, kGeneral>(p, g, smem, dk, dv);
}

// One block per (query tile, head, batch entry): the accumulated dQ, scaled and rounded, to its rows.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(BackwardTile<kHeadDim>::kThreads)
    store_dq(const __grid_constant__ Problem p, const __grid_constant__ Gradients g) {
  using Shape = BackwardTile<kHeadDim>;
  using Layout = BackwardLayout<kHeadDim>;
  auto& tile = shared_memory<Tile<Shape::kQ, kHeadDim>>();

  const WorkItem item(block_index(), ceil_div(p.shape.q_len, Shape::kQ), p.shape.heads);
  const int i = item.tile * Shape::kQ;
  const float scale = ScoreRule<true>(p.scores, item.batch, item.head).scale;
  const float* slots = dq_slots<Shape, kHeadDim>(p, g, item.batch, item.head, i);
  typename Layout::QueryFragment dq;
#pragma unroll
  for (int r = 0; r < dq.kRows; ++r) {
#pragma unroll
    for (int c = 0; c < dq.kCols; ++c) {
      dq.v[r][c] = scale * load_global(slots + (r * dq.kCols + c) * Shape::kThreads);
    }
  }
  const int warp = warp_index();
  store_fragment<Element>(tile, dq,
                          Position<Layout::kQueryAcross>(warp / Layout::kQueryAcross * Layout::kQueryRows,
                                                         warp % Layout::kQueryAcross * 16));
  barrier();
  store_rows(tile, 0, Shape::kQ, thread_index(), Shape::kThreads, head_of(g.dq, item.batch, item.head), g.dq.row_stride,
             i, p.shape.q_len, p.shape.head_dim);
}

}  // namespace jfa::sm80
