// The random calls of soak.cu.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "problem.h"

namespace sanitizer {

constexpr int64_t kOperandElements = 1 << 25;
constexpr int64_t kProducts = int64_t(1) << 35;  // at most: the slowest judge then takes some tenths of a second
constexpr int kMostBatch = 8, kLongest = 3000, kMostSequences = 8;
constexpr int kMostBounds = kMostBatch * (kMostSequences + 1);
constexpr double kScaleOnDevice = 0.1f;

// One call. It is what its seed makes of it.
struct Call {
  enum Gradients { kNone, kAnyOrder, kDeterministic };
  jfa::Shape shape;
  jfa::ElementType type = jfa::ElementType::kBfloat16;
  jfa::Visibility window;
  std::vector<int> q_lengths, k_lengths;
  std::vector<int> cu_q, cu_k;  // of packed sequences, [batch, sequences + 1]
  bool general = false;         // the scale is on the device
  bool one_by_one = false;      // the first run has ended before the second begins
  Gradients gradients = kNone;

  explicit Call(uint64_t seed) : random_(seed) {
    const int dims[] = {JFA_HEAD_DIMS};
    do {
      const int dim = dims[below(sizeof(dims) / sizeof(dims[0]))];
      const int kv_heads = up_to(64), q_len = length();
      shape.batch = up_to(kMostBatch);
      shape.kv_heads = kv_heads;
      shape.heads = kv_heads << (chance(0.5) ? 0 : below(4));
      shape.q_len = q_len;
      shape.k_len = chance(0.4) ? q_len : length();
      shape.head_dim = chance(0.7) ? dim : 8 * (1 + below(dim / 8));
      shape.value_dim = chance(0.7) ? shape.head_dim : 8 * (1 + below(dim / 8));
    } while (too_large());
    type = chance(0.5) ? jfa::ElementType::kHalf : jfa::ElementType::kBfloat16;
    if (chance(0.6)) {
      window.window_right = chance(0.7) ? 0 : up_to(kLongest) - 1;
      if (chance(0.3)) window.window_left = up_to(kLongest) - 1;
      window.bottom_right = chance(0.5);
    }
    if (chance(0.3)) {
      window.sequences = up_to(kMostSequences);
      cu_q = bounds(shape.q_len);
      cu_k = shape.q_len == shape.k_len && chance(0.5) ? cu_q : bounds(shape.k_len);
    } else {
      if (chance(0.25)) q_lengths = lengths(shape.q_len);
      if (chance(0.25)) k_lengths = lengths(shape.k_len);
    }
    general = chance(0.15);
    one_by_one = chance(0.5);
    if (chance(0.6)) gradients = chance(0.5) ? kAnyOrder : kDeterministic;
  }

  double scale() const { return general ? kScaleOnDevice : double(1.0f / std::sqrt(float(shape.head_dim))); }
  int64_t rows() const { return int64_t(shape.batch) * shape.heads * shape.q_len; }

  std::string text() const {
    const jfa::Shape& s = shape;
    std::string text = "batch " + std::to_string(s.batch) + ", q_len " + std::to_string(s.q_len) + ", k_len " +
                       std::to_string(s.k_len) + ", heads " + std::to_string(s.heads) + "/" +
                       std::to_string(s.kv_heads) + ", dims " + std::to_string(s.head_dim) + "/" +
                       std::to_string(s.value_dim) + (type == jfa::ElementType::kHalf ? ", f16" : ", bf16");
    if (window.window_left != jfa::kUnbounded) text += ", left " + std::to_string(window.window_left);
    if (window.window_right != jfa::kUnbounded) text += ", right " + std::to_string(window.window_right);
    if (window.bottom_right) text += ", bottom right";
    const auto add = [&](const char* name, const std::vector<int>& values) {
      for (const int& x : values) text += (&x == values.data() ? name : " ") + std::to_string(x);
    };
    add(", q_lengths ", q_lengths);
    add(", k_lengths ", k_lengths);
    add(", cu_q ", cu_q);
    add(", cu_k ", cu_k);
    if (gradients != kNone) text += gradients == kDeterministic ? ", deterministic gradients" : ", gradients";
    return text + (general ? ", scale on the device" : "") + (one_by_one ? ", runs one by one" : ", runs together");
  }

 private:
  // Not std::*_distribution, whose numbers are the library's choice: a seed means the same everywhere.
  double uniform() { return double(random_() >> 11) / 9007199254740992.0; }
  bool chance(double of) { return uniform() < of; }
  int below(int end) { return static_cast<int>(uniform() * end); }
  int up_to(int last) { return static_cast<int>(std::exp(uniform() * std::log(last + 1.0))); }  // log-uniform, from 1
  int length() { return chance(0.75) ? up_to(kLongest) : 1 + below(kLongest); }
  std::vector<int> lengths(int extent) {
    std::vector<int> values(shape.batch);
    for (int& x : values) x = chance(0.2) ? 0 : chance(0.3) ? extent : below(extent + 1);
    return values;
  }
  std::vector<int> bounds(int extent) {
    std::vector<int> values;
    for (int b = 0; b < shape.batch; ++b) {
      const size_t first = values.size();
      for (int n = 0; n <= window.sequences; ++n) values.push_back(below(extent + 1));
      std::sort(values.begin() + first, values.end());
      if (chance(0.5)) values[first] = 0, values.back() = extent;  // or there are gaps
    }
    return values;
  }
  bool too_large() const {
    const int64_t dim = std::max(shape.head_dim, shape.value_dim);
    return rows() * dim > kOperandElements ||
           int64_t(shape.batch) * shape.k_len * shape.kv_heads * dim > kOperandElements ||
           rows() * shape.k_len * (shape.head_dim + shape.value_dim) > kProducts;
  }

  std::mt19937_64 random_;
};

}  // namespace sanitizer
