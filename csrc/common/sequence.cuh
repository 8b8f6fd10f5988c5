// Who sees whom in one batch entry. Each query row sees one interval of keys. Where causality, windows, lengths and
// alignment say which, it is a formula; spans, packed sequences and segments are read from a table, which
// prepare_visibility() has written before. Loop bounds and masks are both derived from it here, so they cannot
// disagree.
#pragma once

#include "common/device.cuh"
#include "common/math.cuh"
#include "problem.h"

namespace jfa {

struct Interval {
  int begin, end;

  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool contains(int x) const { return begin <= x && x < end; }
};

// One side, rows or keys, of one batch entry in the table. Records are
//   of a token      begin, end of what it sees (0, 0: nothing), offset, -
//   of kTableBlock  begin, end of what all of them see; empty as well where some lie past the length
//   of kTableTile   begin, end of what contains all that any of them sees; whether a token of the tensor sees nothing
class TableSide {
 public:
  __device__ __forceinline__ TableSide(const Problem& p, int b, bool of_rows) : table_(p.visibility.table) {
    const int q_groups = ceil_div(p.shape.q_len, kTableTile), k_groups = ceil_div(p.shape.k_len, kTableTile);
    first_ = (b * (q_groups + k_groups) + (of_rows ? 0 : q_groups)) * kTableGroup;
  }
  __device__ __forceinline__ int* token(int x) const { return record(x, x % unsigned(kTableTile)); }
  __device__ __forceinline__ int* block(int x) const {
    return record(x, kTableTile + x % unsigned(kTableTile) / kTableBlock);
  }
  __device__ __forceinline__ int* tile(int x) const { return record(x, kTableGroup - 1); }

 private:
  __device__ __forceinline__ int* record(int x, int within) const {
    return table_ + int64_t(first_ + int(x / unsigned(kTableTile)) * kTableGroup + within) * 4;
  }
  int* table_;
  int first_;  // record
};

struct Sequence {
  const Problem& p;
  int b;
  int q_len, k_len;          // of this batch entry, not the padded extents
  int offset;                // where there is no table, row i lies at position i + offset among the keys
  int first_key, past_keys;  // what row 0 would see of keys without end: row i sees [i + first_key, i + past_keys)
  bool reads_table;          // a constant; where it is false there is no table

  __device__ __forceinline__ Sequence(const Problem& p_, int b_, int q_len_, int k_len_, bool reads_table_ = true)
      : p(p_), b(b_), q_len(q_len_), k_len(k_len_), reads_table(reads_table_) {
    const Visibility& visibility = p.visibility;
    offset = visibility.bottom_right ? k_len - q_len : 0;
    first_key = offset - min(visibility.window_left, kMaxSequence);
    past_keys = offset + min(visibility.window_right, kMaxSequence) + 1;
  }
  __device__ __forceinline__ Sequence(const Problem& p_, int b_, bool reads_table_ = true)
      : Sequence(p_, b_, length(p_.visibility.q_lengths, b_, p_.shape.q_len),
                 length(p_.visibility.k_lengths, b_, p_.shape.k_len), reads_table_) {}

  __device__ __forceinline__ TableSide table_rows() const { return TableSide(p, b, true); }
  __device__ __forceinline__ TableSide table_keys() const { return TableSide(p, b, false); }
  __device__ __forceinline__ bool has_table() const { return reads_table && p.visibility.table != nullptr; }

  // Row i lies at position i + offset among the keys. Of rows and keys that see each other both say the same.
  __device__ __forceinline__ int offset_of_row(int i) const {
    return has_table() && i < q_len ? load_global(table_rows().token(i) + 2) : offset;
  }
  __device__ __forceinline__ int offset_of_key(int j) const {
    return has_table() && j < k_len ? load_global(table_keys().token(j) + 2) : offset;
  }

  // Keys that row i sees.
  __device__ __forceinline__ Interval keys(int i) const {
    if (has_table()) return i < q_len ? interval(table_rows().token(i)) : Interval{0, 0};
    return {max(0, i + first_key), i < q_len ? min(k_len, i + past_keys) : 0};
  }

  // Rows that see key j.
  __device__ __forceinline__ Interval rows(int j) const {
    if (has_table()) return j < k_len ? interval(table_keys().token(j)) : Interval{0, 0};
    return {max(0, j - past_keys + 1), j < k_len ? min(q_len, j + 1 - first_key) : 0};
  }

  // Of rows and keys inside of what is seen and what sees: without a table that has no gaps.
  __device__ __forceinline__ bool sees(int i) const { return !has_table() || !keys(i).empty(); }
  __device__ __forceinline__ bool is_seen(int j) const { return !has_table() || !rows(j).empty(); }

  // Of tiles: `begin` is a multiple of kTableBlock, and what a table says is that of whole kTableTile.

  // Keys that some row of [begin, end) sees, and perhaps some between them.
  __device__ __forceinline__ Interval keys_of_rows(int begin, int end) const {
    if (has_table()) return hull(table_rows(), begin, end, q_len);
    return {keys(begin).begin, begin < q_len ? keys(min(end, q_len) - 1).end : 0};
  }

  // Keys that every row of [begin, end) below q_len sees: a tile inside needs no mask.
  __device__ __forceinline__ Interval keys_of_all_rows(int begin, int end) const {
    if (has_table()) return common(table_rows(), begin, end, q_len);
    return {keys(min(end, q_len) - 1).begin, keys(begin).end};
  }

  // Rows that see some key of [begin, end), and perhaps some between them.
  __device__ __forceinline__ Interval rows_of_keys(int begin, int end) const {
    if (has_table()) return hull(table_keys(), begin, end, k_len);
    return {max(0, begin - past_keys + 1), begin < k_len ? min(q_len, min(end, k_len) - first_key) : 0};
  }

  // Rows that see every key of [begin, end).
  __device__ __forceinline__ Interval rows_of_all_keys(int begin, int end) const {
    if (has_table()) return common(table_keys(), begin, end, k_len);
    return {rows(end - 1).begin, end <= k_len ? rows(begin).end : 0};
  }

  // Whether there are such gaps in [begin, end), where `begin` is any number. All lanes of a warp ask together.
  __device__ __forceinline__ bool has_blind_rows(int begin, int end) const {
    return has_table() && has_gap(table_rows(), begin, min(end, p.shape.q_len));
  }
  __device__ __forceinline__ bool has_unseen_keys(int begin, int end) const {
    return has_table() && has_gap(table_keys(), begin, min(end, p.shape.k_len));
  }

 private:
  __device__ __forceinline__ static int length(const int* lengths, int b, int extent) {
    return lengths == nullptr ? extent : min(max(load_global(lengths + b), 0), extent);
  }
  __device__ __forceinline__ static Interval interval(const int* record) {
    const int2 x = load_global(reinterpret_cast<const int2*>(record));
    return {x.x, x.y};
  }
  __device__ __forceinline__ static Interval hull(const TableSide& side, int begin, int end, int length) {
    Interval found{kUnbounded, 0};
    for (int x = begin; x < end; x += kTableTile) {
      if (x >= length) break;
      const Interval tile = interval(side.tile(x));
      found = {min(found.begin, tile.begin), max(found.end, tile.end)};
    }
    return found.empty() ? Interval{0, 0} : found;
  }
  __device__ __forceinline__ static Interval common(const TableSide& side, int begin, int end, int length) {
    Interval found{0, kUnbounded};
    for (int x = begin; x < end; x += kTableBlock) {
      const Interval block = x < length ? interval(side.block(x)) : Interval{0, 0};
      found = {max(found.begin, block.begin), min(found.end, block.end)};
    }
    return found;
  }
  // Of no more tiles than a warp has lanes.
  __device__ __forceinline__ static bool has_gap(const TableSide& side, int begin, int end) {
    const int x = begin / kTableTile * kTableTile + lane_index() * kTableTile;
    return any_lane(x < end && load_global(side.tile(x) + 2) != 0);
  }
};

}  // namespace jfa
