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
//   of a token      begin, end of what it sees (0, 0: nothing), offset (row i sits at key position i + offset), flags.
//                   Of a row that sees nothing but sinks, begin and end are where those end at the latest
//   of kTableBlock  begin, end of what all of them see; empty as well where some lie past the length or see not all;
//                   whether some see not all
//   of kTableTile   begin, end of what contains all that any of them sees; whether a token of the tensor sees nothing
constexpr int kSeesAll = 1, kBelongs = 2;  // flags: sees all between; is no padding, whether or not it sees anything

// What a row sees of the keys: its record in the table, or the same by the formula.
struct RowSight {
  Interval keys;  // but for sinks; may end before it begins
  int offset;     // the row lies at its own number plus this among the keys
};

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
  int q_len, k_len;              // where its rows and keys end: not the padded extents
  int q_begin = 0, k_begin = 0;  // not 0 where it is one of several packed ones
  int offset;                    // where there is no table, row i lies at position i + offset among the keys
  int first_key, past_keys;      // what row 0 would see of keys without end: row i sees [i + first_key, i + past_keys)
  bool any_visibility;           // a constant; where it is false there is no table and no sink token

  __device__ __forceinline__ Sequence(const Problem& p_, int b_, int q_len_, int k_len_, bool any_visibility_ = true)
      : p(p_), b(b_), q_len(q_len_), k_len(k_len_), any_visibility(any_visibility_) {
    const Visibility& visibility = p.visibility;
    offset = visibility.bottom_right ? k_len - q_len : 0;
    first_key = offset - min(visibility.window_left, kMaxSequence);
    past_keys = offset + min(visibility.window_right, kMaxSequence) + 1;
  }
  __device__ __forceinline__ Sequence(const Problem& p_, int b_, bool any_visibility_ = true)
      : Sequence(p_, b_, length(p_.visibility.q_lengths, b_, p_.shape.q_len),
                 length(p_.visibility.k_lengths, b_, p_.shape.k_len), any_visibility_) {}

  // One of several packed ones.
  __device__ __forceinline__ Sequence(const Problem& p_, int b_, const Interval& rows, const Interval& keys,
                                      int offset_)
      : p(p_),
        b(b_),
        q_len(rows.end),
        k_len(keys.end),
        q_begin(rows.begin),
        k_begin(keys.begin),
        offset(offset_),
        any_visibility(false) {
    first_key = offset - min(p.visibility.window_left, kMaxSequence);
    past_keys = offset + min(p.visibility.window_right, kMaxSequence) + 1;
  }

  __device__ __forceinline__ TableSide table_rows() const { return TableSide(p, b, true); }
  __device__ __forceinline__ TableSide table_keys() const { return TableSide(p, b, false); }
  __device__ __forceinline__ bool has_segments() const { return any_visibility && p.visibility.q_segments != nullptr; }
  __device__ __forceinline__ bool has_table() const { return any_visibility && p.visibility.table != nullptr; }

  // Row i lies at position i + offset among the keys. Of rows and keys that see each other both say the same.
  __device__ __forceinline__ int offset_of_row(int i) const {
    return has_table() && i < q_len ? load_global(table_rows().token(i) + 2) : offset;
  }
  __device__ __forceinline__ int offset_of_key(int j) const {
    return has_table() && j < k_len ? load_global(table_keys().token(j) + 2) : offset;
  }

  // Keys below it are sinks: row i sees those before keys(i).end.
  __device__ __forceinline__ int sink_keys() const { return any_visibility ? p.visibility.sink_tokens : 0; }

  __device__ __forceinline__ bool is_sink(int j) const { return sink_keys() > 0 && j < sink_keys(); }

  // Whether each row sees one interval, and a formula says which.
  __device__ __forceinline__ bool is_formula() const { return !has_table() && sink_keys() == 0; }

  // Keys that row i sees, but for sinks. May end before it begins.
  __device__ __forceinline__ Interval keys(int i) const {
    if (has_table()) return i < q_len ? interval(table_rows().token(i)) : Interval{0, 0};
    return {max(k_begin, i + first_key), i < q_len ? min(k_len, i + past_keys) : 0};
  }

  // All that is to be known of row i, by one load where a table says it.
  __device__ __forceinline__ RowSight sight_of_row(int i) const {
    if (!has_table()) return {keys(i), offset};
    if (i >= q_len) return {{0, 0}, offset};
    const int4 record = load_global(reinterpret_cast<const int4*>(table_rows().token(i)));
    return {{record.x, record.y}, record.z};
  }

  // Rows that see key j.
  __device__ __forceinline__ Interval rows(int j) const {
    if (has_table()) return j < k_len ? interval(table_keys().token(j)) : Interval{0, 0};
    return {max(q_begin, j - past_keys + 1), j >= k_len ? 0 : is_sink(j) ? q_len : min(q_len, j + 1 - first_key)};
  }

  // Of rows and keys inside of what is seen and what sees: where a formula says that it has no gaps.
  __device__ __forceinline__ bool sees(int i) const {
    if (!has_table()) return true;
    const Interval seen = keys(i);
    return !seen.empty() || (sink_keys() > 0 && seen.end > 0);
  }
  __device__ __forceinline__ bool is_seen(int j) const { return is_formula() || !rows(j).empty(); }

  // Of rows below q_len: whether one is a token of a sequence, and no gap between packed ones.
  __device__ __forceinline__ bool belongs(int i) const {
    return !has_table() || i >= q_len || (load_global(table_rows().token(i) + 3) & kBelongs) != 0;
  }
  // Whether row i sees all of keys(i), or those of its own segment; the same of key j and rows(j).
  __device__ __forceinline__ bool sees_all_keys(int i) const {
    return !has_segments() || i >= q_len || (load_global(table_rows().token(i) + 3) & kSeesAll) != 0;
  }
  // The same of all rows of [begin, begin + kTableBlock), where `begin` is a multiple of that.
  __device__ __forceinline__ bool all_see_all_keys(int begin) const {
    return !has_segments() || begin >= q_len || load_global(table_rows().block(begin) + 2) == 0;
  }
  __device__ __forceinline__ bool seen_by_all_rows(int j) const {
    return !has_segments() || j >= k_len || (load_global(table_keys().token(j) + 3) & kSeesAll) != 0;
  }
  __device__ __forceinline__ const int* row_segments() const {
    return p.visibility.q_segments + int64_t(b) * p.shape.q_len;
  }
  __device__ __forceinline__ const int* key_segments() const {
    return p.visibility.k_segments + int64_t(b) * p.shape.k_len;
  }

  // Of tiles: `begin` is a multiple of kTableBlock, and what a table says is that of whole kTableTile.

  // Keys that some row of [begin, end) sees, but for sinks, and perhaps some between them. May end before it begins.
  __device__ __forceinline__ Interval keys_of_rows(int begin, int end) const {
    if (has_table()) return hull(table_rows(), begin, end, q_len);
    return {keys(begin).begin, begin < q_len ? keys(min(end, q_len) - 1).end : 0};
  }

  // The same of at most 32 kTableTile. All lanes of a warp ask together, and none of them for more than one.
  __device__ __forceinline__ Interval keys_of_rows_by_warp(int begin, int end) const {
    if (!has_table()) return keys_of_rows(begin, end);
    const int x = begin + lane_index() * kTableTile;
    const Interval tile = x < min(end, q_len) ? interval(table_rows().tile(x)) : Interval{kUnbounded, 0};
    const Interval found{min_over_warp(tile.begin), max_over_warp(tile.end)};
    return found.begin > found.end ? Interval{0, 0} : found;
  }

  // Keys that every row of [begin, end) below q_len sees: a tile inside needs no mask.
  __device__ __forceinline__ Interval keys_of_all_rows(int begin, int end) const {
    if (has_table()) return common(table_rows(), begin, end, q_len);
    return {keys(min(end, q_len) - 1).begin, keys(begin).end};
  }

  // Rows that see some key of [begin, end), and perhaps some between them.
  __device__ __forceinline__ Interval rows_of_keys(int begin, int end) const {
    if (has_table()) return hull(table_keys(), begin, end, k_len);
    const int last = is_sink(begin) ? q_len : min(q_len, min(end, k_len) - first_key);
    return {max(q_begin, begin - past_keys + 1), begin < k_len ? last : 0};
  }

  // Rows that see every key of [begin, end).
  __device__ __forceinline__ Interval rows_of_all_keys(int begin, int end) const {
    if (has_table()) return common(table_keys(), begin, end, k_len);
    const int first = is_sink(begin) && sink_keys() < end ? sink_keys() : begin;  // that is seen by no more rows
    return {rows(end - 1).begin, end <= k_len ? rows(first).end : 0};
  }

  // Whether there are such gaps in [begin, end), where `begin` is any number. All lanes of a warp ask together.
  __device__ __forceinline__ bool has_blind_rows(int begin, int end) const {
    return has_table() && has_gap(table_rows(), begin, min(end, p.shape.q_len));
  }
  __device__ __forceinline__ bool has_unseen_keys(int begin, int end) const {
    if (!has_table()) {  // before the first row's window, and past the last one's
      return sink_keys() > 0 && (begin < first_key || min(end, p.shape.k_len) > keys(q_len - 1).end);
    }
    return has_gap(table_keys(), begin, min(end, p.shape.k_len));
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
    return found.begin > found.end ? Interval{0, 0} : found;
  }
  __device__ __forceinline__ static Interval common(const TableSide& side, int begin, int end, int length) {
    const auto block = [&](int x) { return x < length ? interval(side.block(x)) : Interval{0, 0}; };
    Interval found = block(begin);  // of one block nobody waits for what is loaded
    for (int x = begin + kTableBlock; x < end; x += kTableBlock) {
      const Interval next = block(x);
      found = {max(found.begin, next.begin), min(found.end, next.end)};
    }
    return found;
  }
  __device__ __forceinline__ static bool has_gap(const TableSide& side, int begin, int end) {
    int gaps = 0;
#pragma unroll 1
    for (int x = (begin / kTableTile + lane_index()) * kTableTile; x < end; x += kWarpThreads * kTableTile) {
      gaps |= load_global(side.tile(x) + 2);
    }
    return any_lane(gaps != 0);
  }
};

// What the first key of a tile is a multiple of: TMA copies a bias or a mask from multiples of 16 bytes on, and dropout
// numbers keys in blocks of 32.
__device__ __forceinline__ int key_alignment(const Scores& scores) {
  if (scores.dropout.seeds != nullptr) return 32;
  return scores.bias.data != nullptr || scores.mask.data != nullptr ? 16 : 1;
}

// The keys that rows of a tile look at, in tiles of kK: those with sinks first, then those of the interval.
template <int kK>
struct KeyTiles {
  int first;     // key of the first tile
  int sink_end;  // where tiles of sinks end, and those of the interval begin at `resume`; 0 where they need none
  int resume;
  int count;  // of all tiles

  // `keys` are those of keys_of_rows(); what is empty becomes one that is.
  __device__ __forceinline__ KeyTiles(Interval& keys, int sinks, int alignment) {  // a power of two
    sinks = min(sinks, keys.end);
    sink_end = 0;
    if (sinks > 0) {
      const int rounded = ceil_div(sinks, kK) * kK;
      if (keys.empty()) keys = {sinks, sinks};
      sink_end = rounded < keys.begin ? rounded : 0;
    }
    resume = keys.begin & -alignment;
    first = sinks > 0 ? 0 : resume;
    count = sink_end / kK + max(0, ceil_div(keys.end - (sink_end > 0 ? resume : first), kK));
  }
  __device__ __forceinline__ int next(int j) const { return sink_end > 0 && j + kK == sink_end ? resume : j + kK; }
};

// Whether key j is among those that the rows of a tile look at.
__device__ __forceinline__ bool looks_at(const Interval& keys, int sinks, int j) {
  return keys.contains(j) || (sinks > 0 && j < min(sinks, keys.end));
}

// Whether some key of a tile from j on of a tensor of `length` is not.
template <int kK>
__device__ __forceinline__ bool looks_past(const Interval& keys, int sinks, int alignment, int j, int length) {
  return keys.end < min(j + kK, length) || ((sinks > 0 || alignment > 1) && j < keys.begin && j + kK > sinks);
}

}  // namespace jfa
