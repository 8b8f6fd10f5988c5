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

// Which scores exist and what is done to them: s = scale q.k + bias where visible, -inf elsewhere.
struct Scores {
  float scale = 1.0f;
  const float* device_scale = nullptr;  // [1] or [batch]; stands for `scale` when present
  int device_scale_stride = 0;
  ScoreTensor bias;
  ScoreTensor mask;  // bool, true: visible
};

// Whether scores are anything but q.k times a number known on the host: the kernels' one compile-time distinction.
inline bool is_general(const Scores& scores) {
  return scores.device_scale != nullptr || scores.bias.data != nullptr || scores.mask.data != nullptr;
}

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
};

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
  // Scratch. The accumulator and the counters lie next to each other and are zeros when the first kernel has run.
  float* dq_accumulator = nullptr;  // unless deterministic: f32, whole tiles, in an order of the family's own
  uint32_t* counters = nullptr;     // [kBackwardCounters] of work items
  int64_t cleared_floats = 0;       // of both, a multiple of 4
  float* delta = nullptr;           // [batch, heads, q_len]: rowsum(dO o) - dLSE
};

}  // namespace jfa
