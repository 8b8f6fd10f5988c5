// Kernels that prove the emulator: a matrix product that must be right, and the same with one bug planted, each of
// which must be caught. They are written as the package's kernels are, against the same headers.
#include "api.h"
#include "common/device.cuh"
#include "sm80/ptx.cuh"

namespace jfa {
namespace {

enum class Bug : int {
  kNone,
  kNoWait,               // reads a tile whose copies were not waited for
  kNoBarrierAfterWait,   // reads other threads' copies without a barrier
  kNoBarrierBeforeCopy,  // overwrites a tile that other warps still read
  kUncommitted,          // waits for a group that was never committed
  kOutOfBoundsShared,
  kMisalignedShared,
  kUnwrittenShared,
  kPlainShared,  // past the functions that check
  kOutOfBoundsGlobal,
  kMisalignedGlobal,
  kPlainGlobal,
  kWriteInput,
  kWriteTwice,
  kLeaveHole,  // an output element never written
  kDivergentBarrier,
  kDivergentWarp,
  kNoWarpBarrier,  // lanes exchange through shared memory without one
  kCount,
};

constexpr int kTile = 64, kDepth = 32, kWarps = 4, kThreads = kWarps * kWarpThreads, kStages = 2;
constexpr int kRowBytes = kDepth * 2 + 16;  // padded: eight rows fall into different banks
constexpr int kTransposedRowBytes = kTile * 2 + 16;

struct Smem {
  alignas(128) unsigned char a[kStages][kTile * kRowBytes];
  alignas(128) unsigned char b[kStages][kTile * kRowBytes];  // [n][k], or [k][n] with the other pitch
  float partial[kThreads];
};
static_assert(kDepth * kTransposedRowBytes <= kTile * kRowBytes, "both orders of b share one buffer");

// C [m, n] = A [m, k] times B, B being [n, k], or [k, n] when kTransposed; sum [blocks] adds up C's tiles. All extents
// are multiples of the tile's. A block computes one tile of C, a warp 16 rows of it; tiles of k are double buffered.
template <class Element, bool kTransposed>
void gemm(const uint16_t* a, const uint16_t* b, float* c, float* sum, int n, int k, Bug bug) {
  Smem& smem = shared_memory<Smem>();
  const int lane = lane_index(), warp = warp_index(), thread = thread_index();
  const int row = block_index() / (n / kTile) * kTile, col = block_index() % (n / kTile) * kTile;

  const auto load = [&](int stage, int depth) {
    for (int x = thread; x < kTile * kDepth / 8; x += kThreads) {
      const int i = x / (kDepth / 8), chunk = x % (kDepth / 8);
      const uint16_t* source = a + (row + i) * k + depth + chunk * 8;
      if (bug == Bug::kOutOfBoundsGlobal) source += k * 1024;
      if (bug == Bug::kMisalignedGlobal) source += 1;
      const int shift = bug == Bug::kMisalignedShared ? 8 : bug == Bug::kOutOfBoundsShared ? sizeof(Smem) : 0;
      sm80::copy_async_16(shared_address(smem.a[stage]) + i * kRowBytes + chunk * 16 + shift, source, true);
    }
    for (int x = thread; x < kTile * kDepth / 8; x += kThreads) {
      constexpr int kChunks = kTransposed ? kTile / 8 : kDepth / 8;
      const int i = x / kChunks, chunk = x % kChunks;
      const uint16_t* source =
          kTransposed ? b + (depth + i) * n + col + chunk * 8 : b + (col + i) * k + depth + chunk * 8;
      const int pitch = kTransposed ? kTransposedRowBytes : kRowBytes;
      if (bug == Bug::kUnwrittenShared && x == 7) continue;
      sm80::copy_async_16(shared_address(smem.b[stage]) + i * pitch + chunk * 16, source, true);
    }
    if (bug != Bug::kUncommitted) sm80::copy_async_commit();
  };

  float d[kTile / 8][4] = {};
  load(0, 0);
  for (int step = 0; step < k / kDepth; ++step) {
    const int stage = step % kStages;
    if (bug != Bug::kNoBarrierBeforeCopy) barrier();  // nobody reads the other stage any more
    if ((step + 1) * kDepth < k) {
      load((step + 1) % kStages, (step + 1) * kDepth);
    } else {
      sm80::copy_async_commit();
    }
    if (bug == Bug::kNoWait) {
      sm80::copy_async_wait<2>();
    } else {
      sm80::copy_async_wait<1>();
    }
    if (bug != Bug::kNoBarrierAfterWait) barrier();
    for (int inner = 0; inner < kDepth; inner += 16) {
      uint32_t a_registers[4];
      load_matrix_x4(a_registers, shared_address(smem.a[stage]) + (warp * 16 + lane % 16) * kRowBytes +
                                      (inner / 8 + lane / 16) * 16);
      for (int block = 0; block < kTile / 16; ++block) {
        uint32_t b_registers[4];
        const uint32_t base = shared_address(smem.b[stage]);
        if (kTransposed) {
          load_matrix_x4_transposed(b_registers,
                                    base + (inner + lane % 16) * kTransposedRowBytes + (block * 2 + lane / 16) * 16);
        } else {
          load_matrix_x4(b_registers,
                         base + (block * 16 + lane / 16 * 8 + lane % 8) * kRowBytes + (inner / 8 + lane / 8 % 2) * 16);
        }
        for (int half = 0; half < 2; ++half) {
          float (&e)[4] = d[block * 2 + half];
          if (bug == Bug::kDivergentWarp && lane == 5) {
            shuffle_xor(e[0], 1);
            continue;
          }
          sm80::mma<Element>(e[0], e[1], e[2], e[3], a_registers, b_registers[half * 2], b_registers[half * 2 + 1]);
        }
      }
    }
  }

  if (bug == Bug::kDivergentBarrier && warp != 3) barrier();
  float total = 0.0f;
  for (int block = 0; block < kTile / 8; ++block) {
    for (int i = 0; i < 4; ++i) {
      total += d[block][i];
      float* place = c + (row + warp * 16 + lane / 4 + i / 2 * 8) * n + col + block * 8 + lane % 4 * 2 + i % 2;
      if (bug == Bug::kLeaveHole && block == 3 && thread == 77) continue;
      if (bug == Bug::kWriteTwice) place = c + row * n + col;
      if (bug == Bug::kPlainGlobal) *place = 0.0f;
      if (bug == Bug::kWriteInput) place = reinterpret_cast<float*>(const_cast<uint16_t*>(a)) + thread;
      store_global(place, d[block][i]);
    }
  }
  for (int mask = 1; mask < kWarpThreads; mask *= 2) total += shuffle_xor(total, mask);
  if (lane == 0) add_global(sum + block_index(), total);

  // Each lane hands its number to its neighbour, which must find it.
  if (bug == Bug::kPlainShared) smem.partial[thread] = total;
  store_shared_f32(shared_address(&smem.partial[thread]), float(thread));
  if (bug != Bug::kNoWarpBarrier) warp_barrier();
  const int neighbour = warp * kWarpThreads + (lane + 1) % kWarpThreads;
  if (load_shared_f32(shared_address(&smem.partial[neighbour])) != float(neighbour)) store_global(c, NAN);
}

}  // namespace
}  // namespace jfa

extern "C" int selftest_bugs() { return int(jfa::Bug::kCount); }

extern "C" void selftest_gemm(Session* session, emulator::GlobalMemory* memory, const uint16_t* a, const uint16_t* b,
                              float* c, float* sum, int m, int n, int k, int bf16, int transposed, int bug) {
  const auto kernel = bf16 ? (transposed ? jfa::gemm<__nv_bfloat16, true> : jfa::gemm<__nv_bfloat16, false>)
                           : (transposed ? jfa::gemm<__half, true> : jfa::gemm<__half, false>);
  const int blocks = m / jfa::kTile * (n / jfa::kTile);
  memory->set(sum, 0, blocks * sizeof(float));
  emulator::launch(*session, *memory, blocks, jfa::kThreads, sizeof(jfa::Smem),
                   [=] { kernel(a, b, c, sum, n, k, static_cast<jfa::Bug>(bug)); });
}
