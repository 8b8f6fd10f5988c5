// Gradient of a bias, Hopper family:  dBias = sum of dS over the batch entries and heads that share the bias,
//   dS = P (dO V^T - delta),   P = exp(S - lse) recomputed.
//
// Persistent blocks, which own tiles of the gradient: a tile's steps are those batch entries and heads whose rows look
// at its keys, in their order, and its sum stays in registers. Warp 0 loads by TMA: for each step Q and K, then dO and
// V, in chunks of 64 columns through one ring. The warpgroups that compute own 64 rows each, and take turns at issuing
// S = Q K' and dP = dO V', so that one's softmax runs under the other's products. Between two tiles the old sum is
// stored, and the new tile of the bias read, under the new one's first products.
//
// An element of S and dP depends on one row and one key, and what is hidden is selected away: nothing has to be
// cleaned.
#pragma once

#include "common/dropout.cuh"
#include "common/schedule.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/backward_bias_work.cuh"

namespace jfa::sm90 {

// The role of the warp that loads.
template <class Shape>
__device__ __forceinline__ void load_backward_bias(const BackwardBiasArguments& a, BackwardBiasSmem<Shape>& smem) {
  using Place = typename BackwardBiasSmem<Shape>::Place;
  constexpr int kShare = Shape::kK / Shape::kCluster;  // of the keys, that this block loads into all of its cluster
  const int rank = Shape::kCluster > 1 ? cluster_rank() : 0;
  RingPosition<Shape::kPlaces> at(1);
  BiasSteps<Shape> steps(a);
#pragma unroll 1
  while (steps.next([](const BiasItem&) {})) {
    const int kv_head = steps.h / (a.p.shape.heads / a.p.shape.kv_heads);
    const auto load_chunks = [&](const TensorMap& rows, const TensorMap& keys, int chunks) {
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        Place& place = smem.ring[at.slot];
        const uint32_t full = shared_address(&smem.full[at.slot]);
        const uint32_t to = shared_address(place.keys.bytes) + rank * kShare * kRowBytes;
        mbarrier_wait(shared_address(&smem.free[at.slot]), at.parity);
        at.advance();
        if (!elect_one()) continue;
        mbarrier_arrive_expect(full, sizeof(Place));
        tma_load(shared_address(place.rows.bytes), rows, full, c * kChunkCols, steps.first_row + rank * Shape::kQ,
                 steps.h, steps.b);
        const int key = steps.first_key + rank * kShare;
        if constexpr (Shape::kCluster > 1) {
          tma_load_multicast(to, keys, full, c * kChunkCols, key, kv_head, steps.b, 0b11);
        } else {
          tma_load(to, keys, full, c * kChunkCols, key, kv_head, steps.b);
        }
      }
    };
    load_chunks(a.q, a.k, Shape::kHeadChunks);
    load_chunks(a.d_o, a.v, Shape::kValueChunks);
  }
}

// D (+)= A B' of one warpgroup over one chunk, of which kDim columns are not only filled up: issued, not waited for.
template <class Element, int kDim, int kK>
__device__ __forceinline__ void issue_chunk(Fragment<2, kK / 4>& d, uint32_t rows, uint32_t keys, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < (kDim < kChunkCols ? kDim : kChunkCols) / 16; ++step) {
    Wgmma<kK>::template ss<Element, false, false>(d.v, descriptor_at(rows, step * 32), descriptor_at(keys, step * 32),
                                                  step != 0 || accumulate);
  }
  wgmma_commit();
}

// Writes a warp's part of a finished tile, `at` its position.
template <bool kInPairs, int kCols>
__device__ __forceinline__ void store_bias_gradient(const BackwardBiasArguments& a, const BiasItem& item,
                                                    const Position<>& at, const Fragment<2, kCols>& sum) {
  const ScoreTensor& out = a.g.d_bias;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = opaque(at.row(r));
    if (i >= out.q_len) continue;
    float* row = static_cast<float*>(out.data) + item.batch * out.batch_stride + item.head * out.head_stride +
                 i * out.q_stride + at.first_col;
    const int cols = out.k_len - at.first_col;
#pragma unroll
    for (int c = 0; c < kCols; c += 2) {
      const int col = Position<>::col_offset(c);
      if constexpr (kInPairs) {
        if (col < cols) store_global(reinterpret_cast<float2*>(row + col), float2{sum.v[r][c], sum.v[r][c + 1]});
      } else {
        if (col < cols) store_global(row + col, sum.v[r][c]);
        if (col + 1 < cols) store_global(row + col + 1, sum.v[r][c + 1]);
      }
    }
  }
}

// The role of a warpgroup that computes.
template <class Element, class Shape>
__device__ __forceinline__ void compute_backward_bias(const BackwardBiasArguments& a, BackwardBiasSmem<Shape>& smem) {
  using Smem = BackwardBiasSmem<Shape>;
  using Rule = ScoreRule<true>;
  using Scores = Fragment<2, Shape::kK / 4>;
  constexpr int kPlace = sizeof(typename Smem::Place) / 16;  // in a descriptor's units
  const int warpgroup = warp_index() / 4 - 1;
  const uint32_t rows = descriptor(shared_address(smem.ring[0].rows.bytes) + warpgroup * kWarpgroupRows * kRowBytes);
  const uint32_t keys = descriptor(shared_address(smem.ring[0].keys.bytes));
  const uint32_t full = shared_address(smem.full), free = shared_address(smem.free);
  const int warp_row = (Shape::kCluster > 1 ? cluster_rank() * Shape::kQ : 0) + (warp_index() - 4) * 16;
  const float factor = Rule::factor_of(a.p.scores);

  RingPosition<Shape::kPlaces> at(0);
  int released = 0;  // the place to be given back next
  Scores sum;
  // wgmma reads for the whole warpgroup, and so does its wait. In a cluster a place is free when it is in both blocks.
  const auto release = [&](int places) {
#pragma unroll
    for (int n = 0; n < places; ++n) {
      if (thread_index() % kWarpgroupThreads == 0) {
        if constexpr (Shape::kCluster > 1) {
          mbarrier_arrive_remote(free + 8 * released, 0);
          mbarrier_arrive_remote(free + 8 * released, 1);
        } else {
          mbarrier_arrive(free + 8 * released);
        }
      }
      if (++released == Shape::kPlaces) released = 0;
    }
  };
  // A product's chunks as they come. Where they do not fit the ring together, each is given back when the next one has
  // been issued.
  const auto issue = [&](Scores& d, auto dim, bool first_group) {
    constexpr int kDim = decltype(dim)::value;
    constexpr int kLast = (kDim - 1) % kChunkCols + 1, kChunks = (kDim + kChunkCols - 1) / kChunkCols;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      mbarrier_wait(full + 8 * at.slot, at.parity);
      const uint32_t x = rows + at.slot * kPlace, y = keys + at.slot * kPlace;
      if (c + 1 < kChunks) {
        issue_chunk<Element, kChunkCols, Shape::kK>(d, x, y, c > 0);
      } else {
        issue_chunk<Element, kLast, Shape::kK>(d, x, y, c > 0);
      }
      at.advance();
      if (!Shape::kTakesTurns && (c > 0 || !first_group)) {
        wgmma_wait<1>();
        release(1);
      }
    }
  };
  // Turns at issuing, as in the forward: barrier 1 + w is for warpgroup w.
  const auto await_turn = [&] {
    if (Shape::kTakesTurns) named_barrier_sync(1 + warpgroup, 2 * kWarpgroupThreads);
  };
  const auto pass_turn = [&] {
    if (Shape::kTakesTurns) named_barrier_arrive(2 - warpgroup, 2 * kWarpgroupThreads);
  };

  if (warpgroup == 1) pass_turn();  // warpgroup 0 goes first
  BiasSteps<Shape> steps(a);
  const auto store = [&](const BiasItem& item, const Scores& x) {
    const Position<> at(item.first_row + warp_row, item.first_key);
    if (a.in_pairs) {
      store_bias_gradient<true>(a, item, at, x);
    } else {
      store_bias_gradient<false>(a, item, at, x);
    }
  };
  const auto store_zeros = [&](const BiasItem& item) {
    Scores zeros;
    zeros.clear();
    store(item, zeros);
  };
  int summed = -1;  // the item that the sum is of
#pragma unroll 1
  while (steps.next(store_zeros)) {
    Scores s, dp;
    // What a branch changes has to begin as something, or the compiler lets it begin as the last one ended, and copies
    // that between the products.
    dp.clear();
    const int row = steps.first_row + warp_row, key = steps.first_key;
    float lse[2], delta[2];
    bool whole;  // no row of this warp hides a key: not one past the sequence, of which others' numbers would be left
    {
      const Sequence sequence(a.p, steps.b);
      load_row_statistics(a.p, a.g, sequence, steps.b, steps.h, Position<>(row, key), lse, delta);
      whole = !Shape::kReadsScores && row + 16 <= sequence.q_len &&
              Rule::is_whole(sequence.keys_of_all_rows(row, row + 16), key, key + Shape::kK);
    }
    await_turn();
    issue(s, std::integral_constant<int, Shape::kHeadDim>{}, true);
    issue(dp, std::integral_constant<int, Shape::kValueDim>{}, false);
    pass_turn();
    if (steps.first) {
      if (summed >= 0) store(bias_item<Shape>(a, summed), sum);
      summed = steps.number;
      if constexpr (!Shape::kReadsScores) KeptBias<Shape>{a, smem}.load(steps.b, steps.h, Position<>(row, key));
      sum.clear();  // not before: its registers are those of the bias on its way
    }
    if (Shape::kTakesTurns) {
      wgmma_wait<Shape::kValueChunks>();
      release(Shape::kHeadChunks);
    }
    s.settle_all();  // or the compiler looks at the scores before they have been waited for
    const Rule rule(a.p.scores, steps.b, steps.h);
    NoSlopes none;
    if constexpr (Shape::kReadsScores) {
      rule.template apply<true>(s, Position<>(row, key), Sequence(a.p, steps.b), true, none);
    } else {
      const KeptBias<Shape> kept{a, smem};
      const Position<> at(row, key);
      const Sequence sequence(a.p, steps.b);
      const RowsLookedUp rows{sequence, at};
      rule.apply_staged(s, at, rows, none, kept);
      if (!whole) Rule::hide_rows(s, at, sequence, rows);
    }
    if (whole) {
      probabilities_of_rows<false>(s, factor, lse);
    } else {
      probabilities_of_rows<true>(s, factor, lse);
    }
    const bool dropping = drops<Shape>(a.p.scores);
    if (dropping) DropoutBits(a.p, steps.b, steps.h).template mark<false>(s, Position<>(row, key));

    wgmma_wait<0>();
    release(Shape::kTakesTurns ? Shape::kValueChunks : 1);
    dp.settle_all();
    if (dropping) drop_gradients(dp, s, a.p.scores.dropout.kept);
    if (whole) {
      gradients_of_rows<false, Shape::kMayDrop>(s, dp, delta);
    } else {
      gradients_of_rows<true, Shape::kMayDrop>(s, dp, delta);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < Scores::kCols; ++c) sum.v[r][c] += dp.v[r][c];
    }
  }
  if (summed >= 0) store(bias_item<Shape>(a, summed), sum);
}

template <class Element, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward_bias(const __grid_constant__ BackwardBiasArguments a) {
  auto& smem = shared_memory<BackwardBiasSmem<Shape>>();
  if (thread_index() == 0) {
    for (int n = 0; n < Shape::kPlaces; ++n) {
      mbarrier_init(shared_address(&smem.full[n]), 1);
      mbarrier_init(shared_address(&smem.free[n]), Shape::kCluster * Shape::kWarpgroups);
    }
    mbarrier_init_fence();
  }
  if constexpr (Shape::kCluster > 1) {
    cluster_barrier();
  } else {
    barrier();
  }
  if (warp_index() < 4) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp_index() == 0) load_backward_bias<Shape>(a, smem);
  } else {
    grow_registers<Shape::kComputeRegisters>();
    compute_backward_bias<Element, Shape>(a, smem);
  }
  if constexpr (Shape::kCluster > 1) cluster_barrier();  // the other block may still write here
}

}  // namespace jfa::sm90
