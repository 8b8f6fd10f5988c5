// dQ in a fixed order of summation, Hopper family:  dQ = scale sum over key tiles of dS K,
//   dS = P (dO V^T - delta),   P = exp(S - lse) recomputed.
//
// Persistent blocks, built like the forward: warp 0 loads by TMA, and numbers the work; the warpgroups that compute own
// 64 query rows each, and take turns at issuing. In its turn a warpgroup issues dQ += dS(t-1) K(t-1), S(t) = Q K' and
// dP(t) = dO V'; it computes dS(t) under the products of the others. Between two items nothing changes but Q and dO:
// the old dQ is stored under the new item's first scores.
#pragma once

#include "common/dropout.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/forward_store.cuh"
#include "sm90/forward_work.cuh"

namespace jfa::sm90 {

struct BackwardQueryArguments {
  TensorMap q, d_o, k, v;
  Problem p;
  Gradients g;
  WorkOrder order;
  uint32_t* counter;  // of items drawn; 0 before
};

template <class Shape>
struct BackwardQuerySmem {
  struct Rows {  // of one warpgroup
    Tile<kWarpgroupRows, Shape::kHeadDim> q;
    Tile<kWarpgroupRows, Shape::kValueDim> d_o;
  };
  using Keys = Tile<Shape::kK, Shape::kHeadDim>;
  using Values = Tile<Shape::kK, Shape::kValueDim>;

  Rows rows[Shape::kQueryPlaces][Shape::kWarpgroups];
  Keys k[Shape::kKeyPlaces];
  Values v[Shape::kValuePlaces];
  alignas(8) uint64_t item_ready[kItems];
  uint64_t rows_full[Shape::kQueryPlaces][Shape::kWarpgroups];
  uint64_t rows_free[Shape::kQueryPlaces][Shape::kWarpgroups];
  uint64_t k_full[Shape::kKeyPlaces], k_free[Shape::kKeyPlaces];
  uint64_t v_full[Shape::kValuePlaces], v_free[Shape::kValuePlaces];
  uint64_t landed;  // a tile of K that has to be cleaned before it is full
  alignas(kItemBytes) unsigned char items[kItems][kItemBytes];
};

// The role of the warp that loads.
template <class Shape>
__device__ __forceinline__ void load_backward_query(const BackwardQueryArguments& a, BackwardQuerySmem<Shape>& smem) {
  using Smem = BackwardQuerySmem<Shape>;
  using Rows = typename Smem::Rows;
  using Keys = typename Smem::Keys;
  using Values = typename Smem::Values;
  const uint32_t landed = shared_address(&smem.landed);
  RingPosition<Shape::kQueryPlaces> rows_at(1);
  RingPosition<Shape::kKeyPlaces> k_at(1);
  RingPosition<Shape::kValuePlaces> v_at(1);
  uint32_t landed_parity = 0;
  unsigned published = 0;

  // All chunks of a tile; one lane calls it.
  const auto load_chunks = [](auto& tile, const TensorMap& map, uint32_t mbarrier, int row, int head, int batch) {
    using Tile = std::remove_reference_t<decltype(tile)>;
#pragma unroll
    for (int c = 0; c < Tile::kChunks; ++c) {
      tma_load(shared_address(tile.bytes) + c * Tile::kChunkBytes, map, mbarrier, c * kChunkCols, row, head, batch);
    }
  };
  const auto load_rows = [&](const ForwardItem& item) {
#pragma unroll
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      const uint32_t full = shared_address(&smem.rows_full[rows_at.slot][w]);
      Rows& rows = smem.rows[rows_at.slot][w];
      mbarrier_wait(shared_address(&smem.rows_free[rows_at.slot][w]), rows_at.parity);
      if (elect_one()) {
        const int row = item.first_row + w * kWarpgroupRows;
        mbarrier_arrive_expect(full, sizeof(Rows));
        load_chunks(rows.q, a.q, full, row, item.head, item.batch);
        load_chunks(rows.d_o, a.d_o, full, row, item.head, item.batch);
      }
    }
    rows_at.advance();
  };
  // Rows of K that no query of the tile sees become zeros: what lies there belongs to others, and 0 x NaN is NaN. Of V
  // they may stay: their dP is masked.
  const auto load_keys = [&](int j, const Interval& keys, int head, const ForwardItem& item) {
    const uint32_t full = shared_address(&smem.k_full[k_at.slot]);
    Keys& k = smem.k[k_at.slot];
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    const int sinks = sequence.sink_keys();
    // Past the tensor TMA writes zeros.
    const bool clean = looks_past<Shape::kK>(keys, sinks, key_alignment(a.p.scores), j, a.p.shape.k_len) ||
                       sequence.has_unseen_keys(j, j + Shape::kK);
    const uint32_t arrived = clean ? landed : full;
    mbarrier_wait(shared_address(&smem.k_free[k_at.slot]), k_at.parity);
    if (elect_one()) {
      mbarrier_arrive_expect(arrived, Keys::kBytes);
      load_chunks(k, a.k, arrived, j, head, item.batch);
    }
    if (clean) {
      mbarrier_wait(landed, landed_parity);
      landed_parity ^= 1;
      clean_rows<Keys>(shared_address(k.bytes),
                       [&](int row) { return looks_at(keys, sinks, j + row) && sequence.is_seen(j + row); });
      fence_async_shared();
      arrive_for_warp(full);
    }
    k_at.advance();
  };
  const auto load_values = [&](int j, int head, int batch) {
    const uint32_t full = shared_address(&smem.v_full[v_at.slot]);
    mbarrier_wait(shared_address(&smem.v_free[v_at.slot]), v_at.parity);
    if (elect_one()) {
      mbarrier_arrive_expect(full, Values::kBytes);
      load_chunks(smem.v[v_at.slot], a.v, full, j, head, batch);
    }
    v_at.advance();
  };
  const auto publish = [&](const ForwardItem& item) {
    if (lane_index() == 0) {
      store_item(item_address(smem, published), item);
      mbarrier_arrive(shared_address(&smem.item_ready[published % kItems]));
    }
    warp_barrier();
    ++published;
  };

  int number = block_index();
  Interval keys{};
  ForwardItem item{};
  if (number < a.order.items) item = forward_item<Shape>(a, number, 0, keys);
#pragma unroll 1
  while (number < a.order.items) {
    // The next item is drawn late: one drawn early would wait while other blocks have nothing.
    int drawn = 0;
    const int draw_tile = max(item.key_tiles - 2, 1);
    const auto draw = [&] {
      if (!a.order.drawn || lane_index() != 0) return;
      drawn = grid_blocks() + int(increment_global(a.counter, a.order.items - 1));
    };
    const int kv_head = item.head / (a.p.shape.heads / a.p.shape.kv_heads);
    publish(item);
    int j = first_tile(item);
    load_keys(j, keys, kv_head, item);
    load_rows(item);
#pragma unroll 1
    for (int t = 1; t < item.key_tiles; ++t) {
      if (t == draw_tile) draw();
      load_values(j, kv_head, item.batch);
      j = next_tile<Shape>(item, j);
      load_keys(j, keys, kv_head, item);
    }
    if (item.key_tiles == 1) draw();
    // The next item is worked out before the last load, which has to wait for its place anyway.
    number = a.order.drawn ? int(broadcast(drawn)) : number + grid_blocks();
    const int last_batch = item.batch;
    if (number < a.order.items) item = forward_item<Shape>(a, number, 0, keys);
    load_values(j, kv_head, last_batch);
  }
  publish(ForwardItem{-1, 0, 0, 0, 0, 0, 0, 0});
}

// D = A B' of one warpgroup, A [64, kDim] and B [kRows, kDim]: the products are issued, not waited for.
template <class Element, int kDim, int kRows>
__device__ __forceinline__ void issue_product(Fragment<2, kRows / 4>& d, uint32_t a, uint32_t b) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int chunk = step / 4, column_bytes = step % 4 * 32;
    Wgmma<kRows>::template ss<Element, false, false>(
        d.v, descriptor_at(a, chunk * kWarpgroupRows * kRowBytes + column_bytes),
        descriptor_at(b, chunk * kRows * kRowBytes + column_bytes), step != 0);
  }
  wgmma_commit();
}

// dQ += dS K
template <class Element, class Shape>
__device__ __forceinline__ void issue_query_gradient(Fragment<2, Shape::kHeadDim / 4>& dq, const uint32_t (*ds)[4],
                                                     uint32_t k, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kK / 16; ++step) {
    Wgmma<Shape::kHeadDim>::template rs<Element, true>(dq.v, ds[step], descriptor_at(k, step * 16 * kRowBytes),
                                                       step != 0 || accumulate);
  }
  wgmma_commit();
}

// Writes one warp's 16 finished rows, those past q_len as zeros. A quad of lanes holds 32 columns of a row in pieces of
// 2; it turns them into pieces of 8, 16 bytes a lane.
template <class Element, int kCols>
__device__ __forceinline__ void store_query_gradient(const BackwardQueryArguments& a, const ForwardItem& item,
                                                     float scale, const Fragment<2, kCols>& dq) {
  const int warp = opaque(thread_index()) / kWarpThreads - 4;  // among those that compute; a register less in the loop
  const Position<> at(item.first_row + warp * 16, 0);
  const int quad = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = opaque(at.row(r));
    uint16_t* row = head_of(a.g.dq, item.batch, item.head) + i * a.g.dq.row_stride;
#pragma unroll
    for (int block = 0; block < kCols / 8; ++block) {
      uint32_t x[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int c = 8 * block + 2 * n;
        const uint32_t pair = pack<Element>(dq.v[r][c] * scale, dq.v[r][c + 1] * scale);
        x[n] = i < item.q_len ? pair : 0;
      }
      transpose_quad(x, quad);
      const int col = 32 * block + 8 * quad;
      if (i < a.p.shape.q_len && col < a.p.shape.head_dim) {
        store_global_128(row + col, uint4{x[0], x[1], x[2], x[3]});
      }
    }
  }
}

// The role of a warpgroup that computes.
template <class Element, class Shape, bool kGeneral>
__device__ __forceinline__ void compute_backward_query(const BackwardQueryArguments& a,
                                                       BackwardQuerySmem<Shape>& smem) {
  using Smem = BackwardQuerySmem<Shape>;
  constexpr int kScoreCols = Shape::kK / 4;
  // Of shared memory, in a descriptor's units.
  constexpr int kRowsPlace = Shape::kWarpgroups * sizeof(typename Smem::Rows) / 16;
  constexpr int kKeysPlace = Smem::Keys::kBytes / 16;
  constexpr int kValuesPlace = Smem::Values::kBytes / 16;
  const int warpgroup = warp_index() / 4 - 1;
  const uint32_t q = descriptor(shared_address(smem.rows[0][warpgroup].q.bytes));
  const uint32_t d_o = descriptor(shared_address(smem.rows[0][warpgroup].d_o.bytes));
  const uint32_t k = descriptor(shared_address(smem.k), Smem::Keys::kChunkBytes);
  const uint32_t v = descriptor(shared_address(smem.v));
  const uint32_t k_full = shared_address(smem.k_full), k_free = shared_address(smem.k_free);
  const uint32_t v_full = shared_address(smem.v_full), v_free = shared_address(smem.v_free);

  RingPosition<Shape::kQueryPlaces> rows_at(0);
  RingPosition<Shape::kKeyPlaces> k_at(0);
  RingPosition<Shape::kValuePlaces> v_at(0);
  unsigned taken = 0;              // items
  int j = 0, end = 0;              // first key of the current tile, and of the one after the last
  int sink_end = 0;                // where the tiles of the interval follow those of sinks
  Interval unmasked{};             // keys that all rows of this warp see
  float lse[2], delta[2];          // of this thread's rows, lse in log2 units
  int k_slot = -1;                 // the place of the keys that dS is of; none yet
  bool accumulate = false;         // whether dQ has a term of its item already
  uint32_t ds[Shape::kK / 16][4];  // as operand A
  Fragment<2, Shape::kHeadDim / 4> dq;
  dq.clear();

  // Waits for the next item; false: there is none.
  const auto take_item = [&] {
    mbarrier_wait(shared_address(&smem.item_ready[taken % kItems]), taken / kItems % 2);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken++));
    if (item.first_row < 0) return false;
    j = broadcast(first_tile(item));
    end = broadcast(end_of_tiles<Shape>(item));
    sink_end = broadcast(item.sink_end);
    return true;
  };
  const auto begin_rows = [&] {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
    const int row = item.first_row + (warp_index() - 4) * 16;
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    unmasked = sequence.keys_of_all_rows(row, row + 16);
    load_row_statistics(a.p, a.g, sequence, item.batch, item.head, Position<>(row, 0), lse, delta);
  };
  // wgmma reads for the whole warpgroup, and so does its wait.
  const auto release = [&](uint32_t mbarrier) {
    if (thread_index() % kWarpgroupThreads == 0) mbarrier_arrive(mbarrier);
  };
  // Turns at issuing, as in the forward: barrier 1 + w is for warpgroup w.
  const auto await_turn = [&] { named_barrier_sync(1 + warpgroup, 2 * kWarpgroupThreads); };
  const auto pass_turn = [&] {
    named_barrier_arrive(warpgroup + 1 == Shape::kWarpgroups ? 1 : warpgroup + 2, 2 * kWarpgroupThreads);
  };
  const auto apply_rule = [&](Fragment<2, kScoreCols>& s, bool hides, CapSlopes<2, kScoreCols>& slopes) {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
    const ScoreRule<kGeneral> rule(a.p.scores, item.batch, item.head);
    rule.template apply<Shape::kReadsScores>(s, Position<>(item.first_row + (warp_index() - 4) * 16, j),
                                             sequence_of<Shape>(a.p, item), hides, slopes);
  };
  const auto store = [&](unsigned number) {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, number));
    store_query_gradient<Element>(a, item, ScoreRule<kGeneral>(a.p.scores, item.batch, item.head).scale, dq);
  };
  const float factor = ScoreRule<kGeneral>::factor_of(a.p.scores);
  const bool dropping = drops<Shape>(a.p.scores);

  if (warpgroup == Shape::kWarpgroups - 1) pass_turn();  // warpgroup 0 goes first
  bool more = take_item();
  bool first = true;  // tile of its item
#pragma unroll 1
  while (more) {
    Fragment<2, kScoreCols> s, dp;
    CapSlopes<2, kScoreCols> slopes;  // of general scores
    // What a branch changes has to begin as something, or the compiler lets it begin as the last one ended, and copies
    // that between the products.
    if constexpr (kGeneral) dp.clear();
    const int last_k_slot = k_slot;
    k_slot = k_at.slot;
    mbarrier_wait(k_full + 8 * k_slot, k_at.parity);
    k_at.advance();

    await_turn();
    if (last_k_slot >= 0) {
      issue_query_gradient<Element, Shape>(dq, ds, k + last_k_slot * kKeysPlace, accumulate);
    }
    if (first) mbarrier_wait(shared_address(&smem.rows_full[rows_at.slot][warpgroup]), rows_at.parity);
    issue_product<Element, Shape::kHeadDim, Shape::kK>(s, q + rows_at.slot * kRowsPlace, k + k_slot * kKeysPlace);
    mbarrier_wait(v_full + 8 * v_at.slot, v_at.parity);
    issue_product<Element, Shape::kValueDim, Shape::kK>(dp, d_o + rows_at.slot * kRowsPlace,
                                                        v + v_at.slot * kValuesPlace);
    pass_turn();
    if (first) begin_rows();

    wgmma_wait<2>();
    if (last_k_slot >= 0) release(k_free + 8 * last_k_slot);
    if (first && taken > 1) store(taken - 2);

    wgmma_wait<1>();
    if constexpr (kGeneral) s.settle_all();  // or the compiler looks at the scores before they have been waited for
    const bool hides = ScoreRule<kGeneral>::template may_hide<Shape::kReadsScores>(unmasked, j, j + Shape::kK);
    if (kGeneral || hides) apply_rule(s, hides, slopes);
    if (hides) {
      probabilities_of_rows<true>(s, factor, lse);
    } else {
      probabilities_of_rows<false>(s, factor, lse);
    }
    if (dropping) {
      const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
      const int row = item.first_row + (warp_index() - 4) * 16;
      DropoutBits(a.p, item.batch, item.head).template mark<false>(s, Position<>(row, j));
    }

    wgmma_wait<0>();
    if constexpr (kGeneral) dp.settle_all();  // as the scores above
    release(v_free + 8 * v_at.slot);
    v_at.advance();
    accumulate = !first;
    j += Shape::kK;
    first = j == end;
    if (j == sink_end) j = broadcast(load_item<ForwardItem>(item_address(smem, taken - 1)).first_key);
    if (first) {
      arrive_for_warp(shared_address(&smem.rows_free[rows_at.slot][warpgroup]));
      rows_at.advance();
    }
    if (dropping) drop_gradients(dp, s, a.p.scores.dropout.kept);
    if (hides) {
      gradients_of_rows<true, Shape::kMayDrop>(s, dp, delta);
    } else {
      gradients_of_rows<false, Shape::kMayDrop>(s, dp, delta);
    }
    if (kGeneral && a.p.scores.soft_cap != 0.0f) slopes.multiply_into(dp);
    to_operand<Element>(ds, dp);
    if (first) more = take_item();
  }
  await_turn();
  issue_query_gradient<Element, Shape>(dq, ds, k + k_slot * kKeysPlace, accumulate);
  pass_turn();
  wgmma_wait<0>();
  store(taken - 2);
}

template <class Element, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward_query(const __grid_constant__ BackwardQueryArguments a) {
  using Smem = BackwardQuerySmem<Shape>;
  Smem& smem = shared_memory<Smem>();
  if (thread_index() == 0) {
    for (int i = 0; i < kItems; ++i) mbarrier_init(shared_address(&smem.item_ready[i]), 1);
    for (int place = 0; place < Shape::kQueryPlaces; ++place) {
      for (int w = 0; w < Shape::kWarpgroups; ++w) {
        mbarrier_init(shared_address(&smem.rows_full[place][w]), 1);
        mbarrier_init(shared_address(&smem.rows_free[place][w]), 4);  // warps, which also have read the item
      }
    }
    for (int place = 0; place < Shape::kKeyPlaces; ++place) {
      mbarrier_init(shared_address(&smem.k_full[place]), 1);
      mbarrier_init(shared_address(&smem.k_free[place]), Shape::kWarpgroups);
    }
    for (int place = 0; place < Shape::kValuePlaces; ++place) {
      mbarrier_init(shared_address(&smem.v_full[place]), 1);
      mbarrier_init(shared_address(&smem.v_free[place]), Shape::kWarpgroups);
    }
    mbarrier_init(shared_address(&smem.landed), 1);
    mbarrier_init_fence();
  }
  barrier();
  if (warp_index() < 4) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp_index() == 0) load_backward_query<Shape>(a, smem);
  } else {
    grow_registers<Shape::kComputeRegisters>();
    compute_backward_query<Element, Shape, kGeneral>(a, smem);
  }
}

}  // namespace jfa::sm90
