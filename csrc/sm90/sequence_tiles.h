// Which packed sequences have tiles of their own, and the list of these, which sequence_tiles.cuh writes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace jfa::sm90 {

// Tiles of packed sequences, of query rows or of keys, each with those of one only: see sequence_tiles.cuh.
struct SequenceTile {
  int first, stop;  // which are written, perhaps more than a tile has; none: there is no tile
  int q_begin, q_len, k_begin, k_len, offset;  // as in common/sequence.cuh; all 0 where they are of no sequence
  int unused;                                  // two loads of 16 bytes
};
struct SequenceTiles {
  SequenceTile* tiles = nullptr;  // [batch, slots]: those that see most, or are seen by most, first; absent: none
  int* count = nullptr;           // how many there are in the only batch entry; absent: `slots`, or fewer
  int slots = 0;
  int size = 0;  // of a tile
  bool of_keys = false;
};
constexpr int kTiledSequences = 4096;  // more are not copied to shared memory
constexpr int kOrderedTiles = 1024;    // more stay in the order of rows
constexpr int kLeastTile = 64;         // tokens; no tile has fewer

// Whether packed sequences have tiles of their own, for which who sees whom is a formula. Not short ones, of which a
// tile would hold several (of 64 tokens, twice as many tiles); nor where tiles begin at multiples of 16 bytes of a bias
// or of a block of dropout.
inline bool tiles_sequences(const Problem& p) {
  const Visibility& v = p.visibility;
  return v.cu_q != nullptr && v.q_segments == nullptr && v.spans == nullptr && p.scores.sinks.data == nullptr &&
         !reads_scores(p.scores) && p.scores.dropout.seeds == nullptr && v.sequences <= kTiledSequences &&
         p.shape.q_len > int64_t(kLeastTile) * v.sequences;
}
// The same of the backward: plain scores only, and keys as many.
inline bool tiles_sequences_backward(const Problem& p) {
  return tiles_sequences(p) && !is_general(p.scores) && p.shape.k_len > int64_t(kLeastTile) * p.visibility.sequences;
}

// Tiles of `size` along one side of a tensor. Of those that are listed there may be fewer.
inline int64_t tiles_of(const Problem& p, int length, int size, bool listed) {
  return listed ? int64_t(length / size) + p.visibility.sequences + 2 : (int64_t(length) + size - 1) / size;
}
inline int64_t key_tiles(const Problem& p, int size) {
  return tiles_of(p, p.shape.k_len, size, tiles_sequences_backward(p));
}

// Of 16 bytes: those of the longer list, and one for the count.
inline int64_t sequence_tile_records(const Problem& p) {
  if (!tiles_sequences(p)) return 0;
  return 1 + 2 * p.shape.batch * tiles_of(p, std::max(p.shape.q_len, p.shape.k_len), kLeastTile, true);
}

}  // namespace jfa::sm90
