// Which tokens of the other side are of a token's segment: what prepare_visibility() narrows to it what a token sees.
//
// Ids may be any numbers. Almost always they are runs, and tokens side by side have the same: then a warp looks for its
// tokens' segment together.
#pragma once

#include "common/sequence.cuh"

namespace jfa {

// Ids are looked at in blocks, of which the smallest and the largest are known.
constexpr int kIdBlocks = 1024, kIdBlock = 128;  // at most so many, each of so many tokens or a power of two more

struct IdBlocks {
  int lowest[kIdBlocks], highest[kIdBlocks];
};

// What one token sees of the other side.
struct Sight {
  Interval of{0, 0};
  int offset = 0;        // row i lies at position i + offset among the keys
  bool exact = true;     // all of the interval, and not only what is of the same segment
  bool belongs = false;  // to a sequence, and does not lie past its length
};

// The ids of one side of a batch entry.
class SegmentIds {
 public:
  __device__ __forceinline__ SegmentIds(const IdBlocks& blocks, const int* ids, int tokens)
      : blocks_(blocks), ids_(ids), tokens_(tokens), block_(kIdBlock) {
    while (int64_t(block_) * kIdBlocks < tokens) block_ *= 2;
  }

  // All threads of a block. Eight lanes look at a block of ids, so that many loads are under way at a time.
  __device__ __forceinline__ void summarize(int threads) const {
    constexpr int kLanes = 8;
    const int at_once = threads / kLanes;
    for (int round = 0; round * at_once * block_ < tokens_; ++round) {
      const int n = round * at_once + thread_index() / kLanes;
      int lowest = kUnbounded, highest = -kUnbounded - 1;
      for (int part = n * block_; part < (n + 1) * block_; part += kIdBlock) {
        int ids[kIdBlock / kLanes];
        load(ids, part + thread_index() % kLanes, kLanes);
        for (const int id : ids) {
          lowest = min(lowest, id);
          highest = max(highest, id);
        }
      }
      for (int step = 1; step < kLanes; step *= 2) {
        lowest = min(lowest, int(shuffle_xor(uint32_t(lowest), step)));
        highest = max(highest, int(shuffle_xor(uint32_t(highest), step)));
      }
      if (thread_index() % kLanes != 0 || n >= kIdBlocks) continue;
      store_shared_32(shared_address(&blocks_.lowest[n]), lowest);
      store_shared_32(shared_address(&blocks_.highest[n]), highest);
    }
    barrier();
  }

  // Narrows what this lane's token sees to its segment. All lanes of a warp take part.
  __device__ __forceinline__ void narrow(Sight& sight, int id) const {
    constexpr int kTogether = 4;  // different ids of a warp
    bool waits = !sight.of.empty(), alone = false;
#pragma unroll 1
    for (int n = 0; n < kTogether; ++n) {
      const uint32_t waiting = lanes_where(waits);
      if (waiting == 0) break;
      const int wanted = int(shuffle_from(uint32_t(id), lowest_bit(waiting)));
      const bool mine = waits && id == wanted;
      const Interval all{min_over_warp(mine ? sight.of.begin : kUnbounded), max_over_warp(mine ? sight.of.end : 0)};
      Interval run;
      const bool found = find_run(run, wanted, all);
      if (!mine) continue;
      const Interval of{max(sight.of.begin, run.begin), min(sight.of.end, run.end)};
      if (found) sight.of = of.empty() ? Interval{0, 0} : of;
      alone = !found;
      waits = false;
    }
    if (waits || alone) narrow_alone(sight, id);
  }

 private:
  // Ids of tokens from x on, `step` apart: all are on the way before the first is needed. Past the last token the last
  // one's, which is in the block that is looked at.
  template <int kCount>
  __device__ __forceinline__ void load(int (&ids)[kCount], int x, int step) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) ids[i] = load_global(ids_ + min(x + i * step, tokens_ - 1));
  }

  // Where `id` is in `within`. All lanes of a warp take part; false, for all: it is not in one run, or that would take
  // long to find out.
  __device__ __forceinline__ bool find_run(Interval& run, int id, const Interval& within) const {
    constexpr int kMixedBlocks = 4;  // a run has two at most; others lie around its id
    int begin = kUnbounded, end = 0, count = 0, looked_into = 0;
    for (int first = within.begin / block_; first * block_ < within.end; first += kWarpThreads) {
      const int n = first + lane_index();
      const bool inside = n < kIdBlocks && n * block_ < within.end;
      const int lowest = inside ? int(load_shared_32(shared_address(&blocks_.lowest[n]))) : kUnbounded;
      const int highest = inside ? int(load_shared_32(shared_address(&blocks_.highest[n]))) : -kUnbounded - 1;
      if (inside && lowest == id && highest == id) {
        const Interval part{max(n * block_, within.begin), min((n + 1) * block_, within.end)};
        begin = min(begin, part.begin);
        end = part.end;
        count += part.end - part.begin;
      }
      uint32_t mixed = lanes_where(inside && lowest <= id && id <= highest && lowest != highest);
      for (; mixed != 0; mixed &= mixed - 1) {
        if (++looked_into > kMixedBlocks) return false;
        const int from = (first + lowest_bit(mixed)) * block_;
#pragma unroll 1
        for (int part = from; part < from + block_; part += kIdBlock) {
          int ids[kIdBlock / kWarpThreads];
          load(ids, part + lane_index(), kWarpThreads);
          int x = part + lane_index();
          for (const int other : ids) {
            const bool same = other == id && within.contains(x);
            begin = same ? min(begin, x) : begin;
            end = same ? max(end, x + 1) : end;
            count += same;
            x += kWarpThreads;
          }
        }
      }
    }
    run = {min_over_warp(begin), max_over_warp(end)};
    return run.empty() || sum_over_warp(count) == run.end - run.begin;
  }

  // One lane by itself: ids are looked at one by one where they are mixed.
  __device__ __forceinline__ void narrow_alone(Sight& sight, int id) const {
    Interval found{kUnbounded, 0};
    int count = 0;
    for (int n = sight.of.begin / block_; n * block_ < sight.of.end; ++n) {
      const int lowest = load_shared_32(shared_address(&blocks_.lowest[n]));
      const int highest = load_shared_32(shared_address(&blocks_.highest[n]));
      if (id < lowest || id > highest) continue;
      const Interval part{max(n * block_, sight.of.begin), min((n + 1) * block_, sight.of.end)};
      if (lowest == highest) {
        found = {min(found.begin, part.begin), part.end};
        count += part.end - part.begin;
        continue;
      }
      constexpr int kAtOnce = 8;
      for (int first = part.begin; first < part.end; first += kAtOnce) {
        int ids[kAtOnce];
        load(ids, first, 1);
        int x = first;
        for (const int other : ids) {
          const bool same = other == id && x < part.end;
          found = {same ? min(found.begin, x) : found.begin, same ? x + 1 : found.end};
          count += same;
          ++x;
        }
      }
    }
    sight.of = found.empty() ? Interval{0, 0} : found;
    sight.exact = count == sight.of.end - sight.of.begin;
  }

  const IdBlocks& blocks_;
  const int* ids_;
  int tokens_, block_;
};

}  // namespace jfa
