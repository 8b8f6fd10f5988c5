// One call the driver makes, and its inputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "problem.h"

namespace sanitizer {

using Extents = std::array<int, 4>;  // [batch, heads, q_len, k_len], each 1 or the problem's; all 0: absent

inline int64_t count(const Extents& e) { return int64_t(e[0]) * e[1] * e[2] * e[3]; }

struct Case {
  std::string name, family;
  jfa::Shape shape;
  jfa::ElementType type = jfa::ElementType::kBfloat16;
  jfa::Visibility window;                                      // but for its arrays, which are made from those below
  std::vector<int> q_lengths, k_lengths;                       // empty: absent, here and below
  std::vector<int> q_segments, k_segments, spans, cu_q, cu_k;  // as in jfa::Visibility
  std::vector<float> device_scale;                             // [1] or [batch]; empty: absent
  Extents bias = {}, mask = {};
  jfa::ElementType bias_type = jfa::ElementType::kFloat;
  float soft_cap = 0.0f;
  std::vector<float> alibi_slopes, sinks;  // [heads] or [batch, heads]; empty: absent
  uint32_t dropout_steps = 0;              // of 2^16
  bool d_lse = true;
  bool gradients = true;

  float scale() const { return 1.0f / std::sqrt(float(shape.head_dim)); }
};

inline size_t element_bytes(jfa::ElementType type) {
  return type == jfa::ElementType::kFloat ? 4 : type == jfa::ElementType::kBool ? 1 : 2;
}

inline float decode(jfa::ElementType type, const unsigned char* at) {
  float value;
  if (type == jfa::ElementType::kBool) return *at != 0;
  if (type == jfa::ElementType::kFloat) {
    std::memcpy(&value, at, 4);
  } else if (type == jfa::ElementType::kHalf) {
    __half narrow;
    std::memcpy(static_cast<void*>(&narrow), at, 2);
    value = __half2float(narrow);
  } else {
    __nv_bfloat16 narrow;
    std::memcpy(static_cast<void*>(&narrow), at, 2);
    value = __bfloat162float(narrow);
  }
  return value;
}

inline std::vector<float> decode(jfa::ElementType type, const std::vector<unsigned char>& bytes) {
  std::vector<float> values(bytes.size() / element_bytes(type));
  for (size_t n = 0; n < values.size(); ++n) values[n] = decode(type, bytes.data() + n * element_bytes(type));
  return values;
}

inline std::vector<unsigned char> encode(jfa::ElementType type, const std::vector<float>& values) {
  std::vector<unsigned char> bytes(values.size() * element_bytes(type));
  for (size_t n = 0; n < values.size(); ++n) {
    unsigned char* at = bytes.data() + n * element_bytes(type);
    const __half half = __float2half_rn(values[n]);
    const __nv_bfloat16 bfloat16 = __float2bfloat16_rn(values[n]);
    if (type == jfa::ElementType::kFloat) std::memcpy(at, &values[n], 4);
    if (type == jfa::ElementType::kHalf) std::memcpy(at, &half, 2);
    if (type == jfa::ElementType::kBfloat16) std::memcpy(at, &bfloat16, 2);
    if (type == jfa::ElementType::kBool) *at = values[n] != 0.0f;
  }
  return bytes;
}

// N(0, 1), rounded to the types they have on the device. Every second mask element is false.
struct Values {
  std::vector<float> q, k, v, d_o, d_lse, bias, mask;
  std::vector<uint32_t> seeds;

  explicit Values(const Case& c) : random_(1234567) {
    const jfa::Shape& s = c.shape;
    const int64_t rows = int64_t(s.batch) * s.q_len * s.heads, keys = int64_t(s.batch) * s.k_len * s.kv_heads;
    q = draw(rows * s.head_dim, c.type);
    k = draw(keys * s.head_dim, c.type);
    v = draw(keys * s.value_dim, c.type);
    d_o = draw(rows * s.value_dim, c.type);
    if (c.d_lse) d_lse = draw(rows, jfa::ElementType::kFloat);
    bias = draw(count(c.bias), c.bias_type);
    mask = draw(count(c.mask), jfa::ElementType::kFloat);
    for (float& x : mask) x = x > 0.0f;
    if (c.dropout_steps > 0) seeds.resize(size_t(s.batch) * s.heads * 2);
    for (uint32_t& x : seeds) x = random_();
  }

 private:
  std::vector<float> draw(int64_t elements, jfa::ElementType type) {
    std::vector<float> values(elements);
    for (float& x : values) x = normal_(random_);
    return decode(type, encode(type, values));
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

}  // namespace sanitizer
