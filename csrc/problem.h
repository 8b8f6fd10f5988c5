// One attention call as the kernels see it: plain values, passed to them by copy.
// Letters: b batch, i query row, j key row, h head. Sizes and strides count elements.
#pragma once

#include <cstdint>

namespace jfa {

enum class ElementType : int32_t { kHalf, kBfloat16, kFloat, kBool };

// rows x heads x dim per batch entry, the dim contiguous: element (b, row, head, d).
struct Tensor {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// One value per score, element (b, h, i, j); a stride of 0 broadcasts. data == nullptr: absent.
struct ScoreTensor {
  void* data = nullptr;
  ElementType type = ElementType::kFloat;
  int batch = 1, heads = 1, q_len = 1, k_len = 1;  // its own extents, each 1 or the problem's
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t q_stride = 0;
  int k_stride = 0;  // 0 or 1
};

struct Shape {
  int batch = 0;
  int q_len = 0;
  int k_len = 0;
  int heads = 0;
  int kv_heads = 0;   // divides heads; query head h reads key/value head h / (heads / kv_heads)
  int head_dim = 0;   // of q and k
  int value_dim = 0;  // of v and o
};

// One number for each head, [batch or 1, heads]. data == nullptr: absent.
struct HeadNumbers {
  const float* data = nullptr;
  int batch_stride = 0;
};

// Which probabilities are dropped: see common/dropout.cuh.
struct Dropout {
  const uint32_t* seeds = nullptr;  // [batch, heads, 2]; absent: none
  uint32_t steps = 0;               // the rate in units of 2^-16
  float kept = 1.0f;                // what the others are multiplied by

  Dropout() = default;
  Dropout(const uint32_t* seeds_, uint32_t steps_) : seeds(seeds_), steps(steps_), kept(65536.0f / (65536 - steps_)) {}
};

// What is done to scores: s = cap(scale q.k) + bias - slope |i - j| where visible, -inf elsewhere, with
// cap(x) = soft_cap tanh(x / soft_cap); and to probabilities.
struct Scores {
  float scale = 1.0f;
  const float* device_scale = nullptr;  // [1] or [batch]; stands for `scale` when present
  int device_scale_stride = 0;
  float soft_cap = 0.0f;  // 0: none
  ScoreTensor bias;
  HeadNumbers alibi_slopes;  // i and j aligned as in Visibility
  ScoreTensor mask;          // bool, a byte of 0 or 1; 1: visible
  HeadNumbers sinks;         // a score of each row that has no key and no value
  Dropout dropout;
};

// Whether scores are anything but q.k times a number known on the host: the kernels' one compile-time distinction.
// Sinks do not count: they enter when a row is finished.
inline bool is_general(const Scores& scores) {
  return scores.device_scale != nullptr || scores.bias.data != nullptr || scores.mask.data != nullptr ||
         scores.soft_cap != 0.0f || scores.alibi_slopes.data != nullptr || scores.dropout.seeds != nullptr;
}

// Whether there is anything to read for each of them.
inline bool reads_scores(const Scores& scores) { return scores.bias.data != nullptr || scores.mask.data != nullptr; }

constexpr int kUnbounded = 0x7fffffff;
constexpr int kMaxSequence = 1 << 29;  // sums of three such numbers fit an int

// Key j is visible to row i iff  i + offset - window_left <= j <= i + offset + window_right,  i < q_len and j < k_len,
// with offset = 0, or k_len - q_len when aligned at the bottom right. Causal attention is window_right = 0.
struct Visibility {
  int window_left = kUnbounded;
  int window_right = kUnbounded;
  bool bottom_right = false;
  const int* q_lengths = nullptr;  // [batch], clamped to [0, q_len]; absent: q_len
  const int* k_lengths = nullptr;
  int sink_tokens = 0;  // the first keys, which window_left does not hide
  // Rows and keys with different ids do not see each other: [batch, q_len], [batch, k_len]; absent: all do.
  const int* q_segments = nullptr;
  const int* k_segments = nullptr;
  // [batch, span_count, 2]: positions [begin, end) that see each other whatever the window says.
  const int* spans = nullptr;
  int span_count = 0;
  // Sequences packed into one: rows of one are [cu_q[n], cu_q[n + 1]), both [batch, sequences + 1]; absent: one.
  const int* cu_q = nullptr;
  const int* cu_k = nullptr;
  int sequences = 0;
  int* table = nullptr;  // scratch: what prepare_visibility() makes of the above where no formula does
};

// Whether who sees whom is read from a table, see common/sequence.cuh.
inline bool needs_table(const Visibility& v) {
  return v.q_segments != nullptr || v.spans != nullptr || v.cu_q != nullptr;
}
// Whether what a row sees is one interval, and that a formula. Others run kernels that have registers for more.
inline bool is_formula(const Visibility& v) { return !needs_table(v) && v.sink_tokens == 0; }

// Of each side of a batch entry the table has a group of records for kTableTile tokens: one for each, one for each
// kTableBlock of them, and one for all. A record is four ints.
constexpr int kTableBlock = 16, kTableTile = 64;
constexpr int kTableGroup = kTableTile + kTableTile / kTableBlock + 1;

inline int64_t table_records(const Shape& s) {
  const auto groups = [](int64_t tokens) { return (tokens + kTableTile - 1) / kTableTile; };
  return s.batch * (groups(s.q_len) + groups(s.k_len)) * kTableGroup;
}

struct Problem {
  Shape shape;
  ElementType type = ElementType::kBfloat16;
  Tensor q, k, v, o;
  float* lse = nullptr;  // [batch, heads, q_len], natural log; -inf for a row that sees nothing
  Scores scores;
  Visibility visibility;
};

constexpr int kBackwardCounters = 4;  // two are used; the clearing kernel writes 16 bytes at a time

struct Gradients {
  Tensor d_o, dq, dk, dv;
  const float* d_lse = nullptr;  // [batch, heads, q_len]; absent: 0
  ScoreTensor d_bias;            // f32, the bias's own extents; absent: not wanted
  bool deterministic = false;
  // Scratch. All but delta lie next to each other and are zeros when the first kernel has run.
  float* dq_accumulator = nullptr;   // f32, whole tiles, in an order of the family's own; some kernels need none
  uint64_t* rows_to_come = nullptr;  // [batch, heads, key tiles]: how far who adds has come, where there is an order
  uint32_t* counters = nullptr;      // [kBackwardCounters] of work items
  int64_t cleared_floats = 0;        // of these, a multiple of 4
  float* delta = nullptr;            // [batch, heads, q_len]: rowsum(dO o) - dLSE
};

}  // namespace jfa
