// A persistent matrix product in the manner of Hopper kernels, right, and with one bug planted at a time: a warp loads
// by TMA into a ring of tiles, two warpgroups compute with wgmma and store by TMA. In a cluster of two blocks each
// loads half of B for both.
#include "api.h"
#include "sm90/ptx.cuh"
#include "sm90/shared_matrix.cuh"

namespace jfa::sm90 {
namespace {

enum class Bug : int {
  kNone,
  // mbarriers
  kNoFullWait,
  kNoFreeWait,
  kFullParity,
  kTooFewArrivals,
  kTooManyArrivals,
  kExtraArrival,
  kExpectTooMuch,
  kExpectTooLittle,
  kLateWait,  // when the phase after the one waited for has ended as well
  kNoInitFence,
  kNoInitBarrier,
  kInitTwice,
  kTouchMbarrier,
  // TMA
  kMisalignedBox,
  kBoxOutOfBounds,
  kNoProxyFence,
  kNoProxyFenceBeforeLoad,
  kNoBarrierBeforeStore,
  kNoStoreWait,
  kUncommittedStore,
  kUnwaitedStore,
  kUnwaitedLoad,
  // wgmma
  kEarlyRelease,
  kNoWgmmaFence,
  kNoWgmmaWait,
  kTouchAccumulator,
  kReadEarly,  // the results are NaN
  kDifferentProducts,
  kOverlappingAccumulators,
  // threads
  kPartOfWarpElects,
  kTooManyRegisters,
  kRegistersOfThreeWarps,
  kTurnTwice,
  kTurnOfFewer,
  // clusters
  kPartnerGone,
  kReleaseOwnOnly,
  kMailEarly,
  kRankInDescriptor,  // the results are wrong
  kCount,
};

constexpr int kM = 128, kN = 128, kDepth = 64, kStages = 3, kThreads = 384;
using TileA = Tile<kM, kDepth>;
using TileB = Tile<kDepth, kN>;
using TileC = Tile<64, kN>;

struct Smem {
  TileA a[kStages];
  TileB b[kStages];
  TileC c[2];
  alignas(8) uint64_t full[kStages], free[kStages], item_ready, item_free, mail_full;
  uint32_t item, mail;
};

struct Arguments {
  TensorMap a, b, c;  // boxes of kM, kDepth and 64 rows
  int m_tiles, n_tiles, steps;
  uint32_t* counter;
  Bug bug;
};

template <bool kCluster>
void load(const Arguments& x, Smem& smem) {
  constexpr int kBlocks = kCluster ? 2 : 1;
  const int rank = kCluster ? cluster_rank() : 0, items = x.m_tiles / kBlocks * x.n_tiles;
  const Bug bug = x.bug;
  int step = 0;
  const auto send_mail = [&](int next) {
    if (kCluster && rank == 0) store_remote_32(shared_address(&smem.mail), next, shared_address(&smem.mail_full), 1);
  };
  int round = 0;
  for (int item = block_index() / kBlocks; item < items; ++round) {
    int next = 0;
    if (rank == 0) next = grid_blocks() / kBlocks + int(increment_global(x.counter, items - 1));
    mbarrier_wait(shared_address(&smem.item_free), round % 2 ^ 1);
    store_shared_32(shared_address(&smem.item), item);
    mbarrier_arrive(shared_address(&smem.item_ready));
    const int row = (item / x.n_tiles * kBlocks + rank) * kM, col = item % x.n_tiles * kN;
    if (bug == Bug::kMailEarly) send_mail(next);
    for (int s = 0; s < x.steps; ++s, ++step) {
      const int stage = step % kStages;
      const uint32_t full = shared_address(&smem.full[stage]);
      if (bug != Bug::kNoFreeWait) mbarrier_wait(shared_address(&smem.free[stage]), step / kStages % 2 ^ 1);
      const int less = bug == Bug::kExpectTooMuch ? -16 : bug == Bug::kExpectTooLittle ? 16 : 0;
      mbarrier_arrive_expect(full, TileA::kBytes + TileB::kBytes - less);
      if (bug == Bug::kExtraArrival) mbarrier_arrive(full);
      const uint32_t shift = bug == Bug::kMisalignedBox    ? 64
                             : bug == Bug::kBoxOutOfBounds ? sizeof(Smem) / 1024 * 1024
                                                           : 0;
      tma_load(shared_address(smem.a[stage].bytes) + shift, x.a, full, s * kDepth, row, 0, 0);
      for (int chunk = 0; chunk < TileB::kChunks; ++chunk) {
        const uint32_t to = shared_address(smem.b[stage].bytes) + chunk * TileB::kChunkBytes;
        if (!kCluster) tma_load(to, x.b, full, col + chunk * kChunkCols, s * kDepth, 0, 0);
        if (kCluster && chunk == rank) tma_load_multicast(to, x.b, full, col + chunk * kChunkCols, s * kDepth, 0, 0, 3);
      }
    }
    if (bug != Bug::kMailEarly) send_mail(next);
    if (kCluster && rank == 1) {
      mbarrier_arrive_expect(shared_address(&smem.mail_full), 4);
      mbarrier_wait(shared_address(&smem.mail_full), round % 2);
      next = int(load_shared_32(shared_address(&smem.mail)));
    }
    item = next;
  }
  mbarrier_wait(shared_address(&smem.item_free), round % 2 ^ 1);
  store_shared_32(shared_address(&smem.item), uint32_t(-1));
  mbarrier_arrive(shared_address(&smem.item_ready));
  if (bug == Bug::kUnwaitedLoad) {
    const int stage = step % kStages;
    mbarrier_wait(shared_address(&smem.free[stage]), step / kStages % 2 ^ 1);
    mbarrier_arrive_expect(shared_address(&smem.full[stage]), TileA::kBytes);
    tma_load(shared_address(smem.a[stage].bytes), x.a, shared_address(&smem.full[stage]), 0, 0, 0, 0);
  }
}

template <bool kCluster>
void compute(const Arguments& x, Smem& smem) {
  constexpr int kBlocks = kCluster ? 2 : 1;
  const int rank = kCluster ? cluster_rank() : 0, warpgroup = warp_index() / 4 - 1, thread = thread_index() % 128;
  const Bug bug = x.bug;
  const auto sync = [&] { named_barrier_sync(8 + warpgroup, 128); };
  const auto await_turn = [&] { named_barrier_sync(1 + warpgroup, 256); };
  const auto pass_turn = [&] {
    named_barrier_arrive(2 - warpgroup, bug == Bug::kTurnOfFewer ? 128 : 256);
    if (bug == Bug::kTurnTwice) named_barrier_arrive(2 - warpgroup, 256);
  };
  const auto release = [&](int stage) {
    if (thread != 0) return;
    for (int r = 0; r < kBlocks; ++r) {
      if (!kCluster) mbarrier_arrive(shared_address(&smem.free[stage]));
      if (kCluster && !(bug == Bug::kReleaseOwnOnly && r != rank)) {
        mbarrier_arrive_remote(shared_address(&smem.free[stage]), r);
      }
    }
  };
  const auto low = [&](const void* p, int chunk_stride) {
    if (bug != Bug::kRankInDescriptor) return descriptor(shared_address(p), chunk_stride);
    return uint32_t(chunk_stride) / 16 << 16 | shared_address(p) >> 4;
  };
  int step = 0;
  if (warpgroup == 1) pass_turn();  // warpgroup 0 goes first
  for (int round = 0;; ++round) {
    mbarrier_wait(shared_address(&smem.item_ready), round % 2);
    const int item = int(load_shared_32(shared_address(&smem.item)));
    sync();
    if (thread == 0) mbarrier_arrive(shared_address(&smem.item_free));
    if (item < 0) break;
    float d[2][kN / 4], early = 0.0f;
    for (int s = 0; s < x.steps; ++s, ++step) {
      const int stage = step % kStages;
      const uint32_t parity = step / kStages % 2 ^ (bug == Bug::kFullParity);
      if (bug != Bug::kNoFullWait || warpgroup != 0) mbarrier_wait(shared_address(&smem.full[stage]), parity);
      const int same = bug == Bug::kDifferentProducts && thread / 32 == 1 ? 1 : 0;
      const uint32_t a = low(smem.a[stage].bytes + warpgroup * 64 * kRowBytes, 16) + same;
      const uint32_t b = low(smem.b[stage].bytes, TileB::kChunkBytes);
      await_turn();
      if (bug != Bug::kNoWgmmaFence) wgmma_fence();
      for (int inner = 0; inner < kDepth / 16; ++inner) {
        auto& registers =
            bug == Bug::kOverlappingAccumulators && inner == 1 ? reinterpret_cast<float (&)[2][kN / 4]>(d[0][2]) : d;
        Wgmma<kN>::ss<__half, false, true>(registers, descriptor_at(a, inner * 32),
                                           descriptor_at(b, inner * 16 * kRowBytes), s + inner != 0);
      }
      wgmma_commit();
      pass_turn();
      if (bug == Bug::kTouchAccumulator && thread == 77) d[1][3] += 1.0f;
      if (bug == Bug::kReadEarly) early += d[0][0];
      if (bug == Bug::kEarlyRelease) {
        release(stage);
        wgmma_wait<0>();
      } else if (bug != Bug::kNoWgmmaWait) {
        if (s > 0) {
          wgmma_wait<1>();
          release((step - 1) % kStages);
        }
        if (s == x.steps - 1) {
          wgmma_wait<0>();
          release(stage);
        }
      } else {
        release(stage);
      }
    }
    d[0][0] += early;
    if (thread == 0 && bug != Bug::kNoStoreWait) tma_store_wait_read();
    sync();
    const uint32_t c = shared_address(smem.c[warpgroup].bytes);
    for (int block = 0; block < kN / 16; ++block) {
      uint32_t r[4];
      for (int i = 0; i < 4; ++i) {
        const __half2 two = __floats2half2_rn(d[i % 2][4 * block + i / 2 * 2], d[i % 2][4 * block + i / 2 * 2 + 1]);
        memcpy(&r[i], &two, 4);
      }
      store_matrix_x4(c + TileC::offset_bytes(thread / 32 * 16 + thread % 16, 2 * block + thread % 32 / 16), r);
    }
    if (bug != Bug::kNoProxyFence || thread != 100) fence_async_shared();
    if (bug != Bug::kNoBarrierBeforeStore) sync();
    if (thread == 0) {
      const int row = (item / x.n_tiles * kBlocks + rank) * kM + warpgroup * 64, col = item % x.n_tiles * kN;
      for (int chunk = 0; chunk < TileC::kChunks; ++chunk) {
        tma_store(x.c, c + chunk * TileC::kChunkBytes, col + chunk * kChunkCols, row, 0, 0);
      }
      if (bug != Bug::kUncommittedStore) tma_store_commit();
    }
  }
  if (thread == 0 && bug != Bug::kUnwaitedStore) tma_store_wait();
}

template <bool kCluster>
void product(Arguments x) {
  Smem& smem = shared_memory<Smem>();
  const Bug bug = x.bug;
  if (thread_index() == 0) {
    const int arrivals = (kCluster ? 4 : 2) + (bug == Bug::kTooManyArrivals) - (bug == Bug::kTooFewArrivals);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared_address(&smem.full[i]), 1);
      mbarrier_init(shared_address(&smem.free[i]), arrivals);
    }
    mbarrier_init(shared_address(&smem.item_ready), 1);
    mbarrier_init(shared_address(&smem.item_free), 2);
    mbarrier_init(shared_address(&smem.mail_full), 1);
    if (bug == Bug::kInitTwice) mbarrier_init(shared_address(&smem.mail_full), 1);
    if (bug == Bug::kTouchMbarrier) store_shared_32(shared_address(&smem.full[0]), 0);
    if (bug != Bug::kNoInitFence) mbarrier_init_fence();
  }
  if (bug == Bug::kNoProxyFenceBeforeLoad && thread_index() == 9) store_shared_32(shared_address(smem.a[0].bytes), 0);
  if (kCluster) {
    cluster_barrier();
  } else if (bug != Bug::kNoInitBarrier) {
    barrier();
  }
  if (warp_index() / 4 == 0) {
    if (bug != Bug::kRegistersOfThreeWarps || warp_index() != 2) shrink_registers<40>();
    if (warp_index() == 0) {
      if (bug == Bug::kPartOfWarpElects && lane_index() > 15) return;
      if (elect_one()) load<kCluster>(x, smem);
    }
  } else {
    if (bug == Bug::kTooManyRegisters) {
      grow_registers<240>();
    } else {
      grow_registers<232>();
    }
    compute<kCluster>(x, smem);
  }
  if (bug == Bug::kLateWait) {
    barrier();
    if (thread_index() == 40) mbarrier_wait(shared_address(&smem.full[0]), 0);
  }
  if (kCluster && bug != Bug::kPartnerGone) cluster_barrier();
}

}  // namespace
}  // namespace jfa::sm90

extern "C" int selftest_pipeline_bugs() { return int(jfa::sm90::Bug::kCount); }

// C [m, n] = A [m, k] B [k, n], float16; n and k are multiples of 8.
extern "C" void selftest_pipeline(Session* session, emulator::GlobalMemory* memory, void* a, void* b, void* c,
                                  uint32_t* counter, int m, int n, int k, int cluster, int bug) {
  using namespace jfa;
  using namespace jfa::sm90;
  Arguments x;
  const auto map = [&](TensorMap& to, void* data, int rows, int cols, int box_rows) {
    const Status status = make_tensor_map(to, {data, 0, cols, 0}, ElementType::kHalf, cols, rows, 1, 1, box_rows);
    if (!status.ok()) snprintf(session->fault, sizeof(session->fault), "%s", status.message.c_str());
  };
  map(x.a, a, m, k, kM);
  map(x.b, b, k, n, kDepth);
  map(x.c, c, m, n, 64);
  x.m_tiles = (m + kM * cluster - 1) / (kM * cluster) * cluster;
  x.n_tiles = (n + kN - 1) / kN;
  x.steps = (k + kDepth - 1) / kDepth;
  x.counter = counter;
  x.bug = static_cast<Bug>(bug);
  memory->set(counter, 0, sizeof(*counter));
  const int blocks = int(session->multiprocessors) / cluster * cluster;
  const auto kernel = cluster == 2 ? product<true> : product<false>;
  emulator::launch(*session, *memory, blocks, kThreads, sizeof(Smem), [=] { kernel(x); }, cluster);
}
