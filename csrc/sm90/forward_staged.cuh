// A bias or a mask of the Hopper forward, and of the kernel for dQ, where TMA can copy it: a warp of its own loads, for
// each warpgroup that computes, that one's tile of 64 rows. A bias is read while products become scores, a mask while
// they run, and given back at once. A mask is half as large as a bias, and has two places where a bias has one.
#pragma once

#include "sm90/forward_work.cuh"
#include "sm90/staged_scores.cuh"

namespace jfa::sm90 {

template <class Smem>
__device__ __forceinline__ void init_staged_places(Smem& smem) {
  for (auto& of_warpgroup : smem.staged_full) {
    for (uint64_t& full : of_warpgroup) mbarrier_init(shared_address(&full), 1);
  }
  for (auto& of_warpgroup : smem.staged_free) {
    for (uint64_t& free : of_warpgroup) mbarrier_init(shared_address(&free), 4);  // of each warp
  }
}

// The place of the `number`-th tile of a warpgroup, and which of that place's rounds it is.
struct StagedPlace {
  uint32_t bytes, full, free;
  uint32_t round;

  template <class Arguments, class Smem>
  __device__ __forceinline__ StagedPlace(const Arguments& a, const Smem& smem, int warpgroup, uint32_t number) {
    using Staged = typename Smem::StagedBias;
    static_assert(kStagedPlaces == 2 && 2 * Smem::StagedMask::kBytes <= Staged::kBytes);
    const uint32_t of_many = a.staged == StagedScores::kMask;
    const uint32_t place = number & of_many;
    round = number >> of_many;
    bytes = shared_address(smem.staged.scores[warpgroup].bytes) + place * (Staged::kBytes / kStagedPlaces);
    full = shared_address(&smem.staged_full[warpgroup][place]);
    free = shared_address(&smem.staged_free[warpgroup][place]);
  }
};

// What the warp that loads them does for an item; `number` counts the tiles.
template <class Shape, class Arguments, class Smem>
__device__ __forceinline__ void load_staged_of_item(const Arguments& a, Smem& smem, const ForwardItem& item,
                                                    uint32_t& number) {
  int j = first_tile(item);
#pragma unroll 1
  for (int t = 0; t < item.key_tiles; ++t, j = next_tile<Shape>(item, j), ++number) {
#pragma unroll 1
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      const StagedPlace place(a, smem, w, number);
      mbarrier_wait(place.free, (place.round + 1) % 2);
      if (!elect_one()) continue;
      load_staged_tile<Smem>(a, place.bytes, place.full, j, item.first_row + w * kWarpgroupRows, item.head, item.batch);
    }
  }
}

// The role of that warp in the forward, along all items.
template <class Shape>
__device__ __forceinline__ void load_staged(const ForwardArguments& a, ForwardSmem<Shape>& smem) {
  uint32_t number = 0;
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const auto queries = QueryPlace<Shape>::of(taken);
    mbarrier_wait(shared_address(&smem.item_ready[queries.slot]), queries.parity);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken));
    if (item.first_row < 0) break;
    arrive_for_lane(shared_address(&smem.q_free[queries.slot]));  // the item has been read
    load_staged_of_item<Shape>(a, smem, item, number);
  }
}

// What a warpgroup that computes reads of them: ScoreRule adds the bias, or hides by the mask, of the current tile.
template <class Element, class Arguments, class Smem>
class StagedReader {
 public:
  __device__ __forceinline__ StagedReader(const Arguments& a, const Smem& smem) : a_(a), smem_(smem) {}

  __device__ __forceinline__ bool adds() const { return a_.staged == StagedScores::kBias; }
  __device__ __forceinline__ bool hides() const { return a_.staged == StagedScores::kMask; }

  // Call it while the product runs that makes the scores: all of a mask fits two registers.
  __device__ __forceinline__ void load_ahead() {
    if (!hides()) return;
    const int warp = warp_index() - 4;
    const StagedPlace place = await_tile(warp);
    // Of each row a lane gets the bytes of columns 4t to 4t + 3 of each 16, t = lane % 4. The bytes of block n of 16
    // columns become bits n of one word: a bool is 0 or 1.
    visible_[0] = visible_[1] = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      uint32_t bytes[4];
      load_matrix_x4(bytes, place.bytes + Smem::StagedMask::offset_bytes(row_of_lane(warp), block + lane_index() / 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (block + n / 2 < kBlocks) visible_[n % 2] += bytes[n] << (block + n / 2);
      }
    }
    give_back(place, visible_[0] ^ visible_[1]);
    hides_some_ = any_lane((visible_[0] & visible_[1]) != 0x01010101u * ((1u << kBlocks) - 1));
    // The fragment has columns 2t, 2t + 1, 8 + 2t and 8 + 2t + 1: two of the lane's own quad have them.
    const int source = lane_index() / 4 * 4 + lane_index() % 4 / 2, shift = lane_index() % 2 * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t low = shuffle_from(visible_[r], source), high = shuffle_from(visible_[r], source + 2);
      visible_[r] = (low >> shift & 0xffff) | high >> shift << 16;
    }
  }

  template <int kCols>
  __device__ __forceinline__ void hide(Fragment<2, kCols>& s) const {
    if (!hides_some_) return;
    // In the order of the bits: seven become predicates by one instruction.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          float& x = s.v[r][4 * block + n];
          x = (visible_[r] & 1u << (8 * n + block)) != 0 ? x : minus_infinity();
        }
      }
    }
  }

  template <int kCols>
  __device__ __forceinline__ void add(Fragment<2, kCols>& s) {
    const int warp = warp_index() - 4;
    const StagedPlace place = await_tile(warp);
    uint32_t loaded = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t pairs[4];
      load_matrix_x4(pairs,
                     place.bytes + Smem::StagedBias::offset_bytes(row_of_lane(warp), 2 * block + lane_index() / 16));
      loaded ^= pairs[0];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 pair = unpack<Element>(pairs[n]);
        float* x = &s.v[n % 2][4 * block + n / 2 * 2];
        x[0] = fmaf(kLog2e, pair.x, x[0]);
        x[1] = fmaf(kLog2e, pair.y, x[1]);
      }
    }
    give_back(place, loaded);
  }

 private:
  static constexpr int kBlocks = Smem::StagedBias::kCols / 16;
  static_assert(kBlocks <= 8, "a byte has a bit for each block of 16 keys");

  const Arguments& a_;
  const Smem& smem_;
  uint32_t number_ = 0;  // of the next tile
  uint32_t visible_[2];  // of each row of the fragment; column c is bit c / 4 of byte c % 4
  bool hides_some_ = false;

  // That this lane addresses for ldmatrix.
  __device__ __forceinline__ int row_of_lane(int warp) const {
    return (warp % 4 * 16 + lane_index() % 16) & a_.staged_row_mask;
  }
  __device__ __forceinline__ StagedPlace await_tile(int warp) {
    const StagedPlace place(a_, smem_, warp / 4, number_++);
    mbarrier_wait(place.full, place.round % 2);
    return place;
  }
  // `loaded`: made of a register of each load.
  __device__ __forceinline__ static void give_back(const StagedPlace& place, uint32_t loaded) {
    settle_loads(loaded);
    arrive_for_warp(place.free);
  }
};

}  // namespace jfa::sm90
