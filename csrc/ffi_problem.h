// From XLA's buffers and attributes to a Problem, with every check. An exported program does not pass through Python,
// so nothing that Python checks is taken for granted.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "launch.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jfa {

namespace ffi = xla::ffi;

using Dims = std::vector<int64_t>;

inline std::string text(const Dims& dims) {
  std::string out = "[";
  for (size_t n = 0; n < dims.size(); ++n) out += (n ? "," : "") + std::to_string(dims[n]);
  return out + "]";
}

// Buffers are read through this, which remembers the first thing that is wrong with them.
class Reader {
 public:
  Status status = Status::Ok();

  void expect(bool condition, const std::string& why) {
    if (!condition && status.ok()) status = Status::InvalidArgument("jax_flashattn: " + why);
  }

  static bool absent(const ffi::AnyBuffer& x) { return x.dimensions().size() == 1 && x.dimensions()[0] == 0; }

  static Dims dims(const ffi::AnyBuffer& x) { return Dims(x.dimensions().begin(), x.dimensions().end()); }

  void* data(const char* name, const ffi::AnyBuffer& x, ffi::DataType type, const Dims& expected) {
    expect(x.element_type() == type, std::string(name) + " has an element type that this call does not take");
    expect(dims(x) == expected, std::string(name) + " has shape " + text(dims(x)) + ", expected " + text(expected));
    expect(reinterpret_cast<uintptr_t>(x.untyped_data()) % 16 == 0, std::string(name) + " is not aligned to 16 bytes");
    return x.untyped_data();
  }

  // [batch, rows, heads, dim]
  Tensor tensor(const char* name, const ffi::AnyBuffer& x, ffi::DataType type, const Dims& expected) {
    Tensor t;
    t.data = data(name, x, type, expected);
    t.head_stride = expected[3];
    t.row_stride = expected[2] * t.head_stride;
    t.batch_stride = expected[1] * t.row_stride;
    return t;
  }

  // [batch or 1, heads or 1, q_len or 1, k_len or 1]
  ScoreTensor score_tensor(const char* name, const ffi::AnyBuffer& x, const Shape& shape) {
    ScoreTensor t;
    const Dims full = {shape.batch, shape.heads, shape.q_len, shape.k_len};
    const Dims own = dims(x);
    bool broadcasts = own.size() == 4;
    for (size_t n = 0; broadcasts && n < 4; ++n) broadcasts = own[n] == 1 || own[n] == full[n];
    expect(broadcasts, std::string(name) + " has shape " + text(own) + ", which does not broadcast to " + text(full));
    if (!broadcasts) return t;
    t.data = x.untyped_data();
    t.batch = static_cast<int>(own[0]);
    t.heads = static_cast<int>(own[1]);
    t.q_len = static_cast<int>(own[2]);
    t.k_len = static_cast<int>(own[3]);
    t.k_stride = own[3] > 1;
    t.q_stride = own[2] > 1 ? own[3] : 0;
    t.head_stride = own[1] > 1 ? own[2] * own[3] : 0;
    t.batch_stride = own[0] > 1 ? own[1] * own[2] * own[3] : 0;
    if (x.element_type() == ffi::F16) {
      t.type = ElementType::kHalf;
    } else if (x.element_type() == ffi::BF16) {
      t.type = ElementType::kBfloat16;
    } else if (x.element_type() == ffi::F32) {
      t.type = ElementType::kFloat;
    } else {
      expect(x.element_type() == ffi::PRED, std::string(name) + " must be float16, bfloat16, float32 or bool");
      t.type = ElementType::kBool;
    }
    return t;
  }

  const int* lengths(const char* name, const ffi::AnyBuffer& x, int batch) {
    if (absent(x) && batch != 0) return nullptr;
    return static_cast<const int*>(data(name, x, ffi::S32, {batch}));
  }

  // float32 [batch or 1, heads]
  HeadNumbers head_numbers(const char* name, const ffi::AnyBuffer& x, const Shape& shape) {
    HeadNumbers numbers;
    if (absent(x)) return numbers;
    const Dims own = dims(x);
    const int64_t batch = !own.empty() && own[0] == 1 ? 1 : shape.batch;
    numbers.data = static_cast<const float*>(data(name, x, ffi::F32, {batch, shape.heads}));
    numbers.batch_stride = batch > 1 ? shape.heads : 0;
    return numbers;
  }

  // Never null: an empty array may have no address, and is present all the same.
  const int* ints(const char* name, const ffi::AnyBuffer& x, const Dims& expected) {
    static const int kNothing = 0;
    const void* const at = data(name, x, ffi::S32, expected);
    return at == nullptr ? &kNothing : static_cast<const int*>(at);
  }

  // int32 [batch, length]
  const int* per_token(const char* name, const ffi::AnyBuffer& x, int batch, int64_t length) {
    if (absent(x)) return nullptr;
    return ints(name, x, {batch, length});
  }

  int extent(const char* what, int64_t value) {
    expect(value <= kUnbounded, std::string(what) + " is " + std::to_string(value) + ", more than 2147483647");
    return static_cast<int>(value);
  }
};

struct Attributes {
  float scale;
  int32_t window_left, window_right;
  bool bottom_right;
  float soft_cap;
  int32_t num_sink_tokens, dropout_steps;
  std::string_view family;
};

struct Operands {
  ffi::AnyBuffer q, k, v, bias, mask, scale, q_lengths, k_lengths;
  ffi::AnyBuffer alibi_slopes, sinks, dropout_seeds, q_segments, k_segments, spans, cu_q, cu_k;
};

inline Problem read_problem(Reader& reader, const Operands& in, const ffi::AnyBuffer& o, const ffi::AnyBuffer& lse,
                            const Attributes& attributes) {
  Problem p;
  const Dims q = Reader::dims(in.q), k = Reader::dims(in.k), v = Reader::dims(in.v);
  reader.expect(q.size() == 4 && k.size() == 4 && v.size() == 4, "query, key and value must have rank 4");
  if (!reader.status.ok()) return p;
  p.shape = {reader.extent("batch", q[0]),    reader.extent("query length", q[1]), reader.extent("key length", k[1]),
             reader.extent("heads", q[2]),    reader.extent("key heads", k[2]),    reader.extent("head dim", q[3]),
             reader.extent("value dim", v[3])};
  const Shape& shape = p.shape;
  reader.expect(
      shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0,
      std::to_string(shape.heads) + " query heads are no multiple of " + std::to_string(shape.kv_heads) + " key heads");
  reader.expect(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.value_dim > 0 && shape.value_dim % 8 == 0,
                "head dims must be positive multiples of 8");
  const ffi::DataType type = in.q.element_type();
  reader.expect(type == ffi::F16 || type == ffi::BF16, "query must be float16 or bfloat16");
  p.type = type == ffi::F16 ? ElementType::kHalf : ElementType::kBfloat16;
  p.q = reader.tensor("query", in.q, type, {q[0], q[1], q[2], q[3]});
  p.k = reader.tensor("key", in.k, type, {q[0], k[1], k[2], q[3]});
  p.v = reader.tensor("value", in.v, type, {q[0], k[1], k[2], v[3]});
  p.o = reader.tensor("out", o, type, {q[0], q[1], q[2], v[3]});
  p.lse = static_cast<float*>(reader.data("lse", lse, ffi::F32, {q[0], q[2], q[1]}));

  p.scores.scale = attributes.scale;
  if (!Reader::absent(in.scale)) {
    const int64_t count = static_cast<int64_t>(in.scale.element_count());
    reader.expect(count == 1 || count == shape.batch, "scale must have 1 or batch elements");
    p.scores.device_scale = static_cast<const float*>(reader.data("scale", in.scale, ffi::F32, {count}));
    p.scores.device_scale_stride = count > 1;
  }
  if (!Reader::absent(in.bias)) {
    p.scores.bias = reader.score_tensor("bias", in.bias, shape);
    reader.expect(p.scores.bias.type != ElementType::kBool, "bias must not be bool");
  }
  if (!Reader::absent(in.mask)) {
    p.scores.mask = reader.score_tensor("mask", in.mask, shape);
    reader.expect(p.scores.mask.type == ElementType::kBool, "mask must be bool");
  }
  reader.expect(attributes.window_left >= 0 && attributes.window_right >= 0, "a window must not be negative");
  p.visibility.window_left = attributes.window_left;
  p.visibility.window_right = attributes.window_right;
  p.visibility.bottom_right = attributes.bottom_right;
  p.visibility.q_lengths = reader.lengths("query_seq_lengths", in.q_lengths, shape.batch);
  p.visibility.k_lengths = reader.lengths("key_value_seq_lengths", in.k_lengths, shape.batch);

  reader.expect(attributes.soft_cap >= 0 && std::isfinite(attributes.soft_cap),
                "a soft cap must be finite and not negative");
  p.scores.soft_cap = attributes.soft_cap;
  p.scores.alibi_slopes = reader.head_numbers("alibi_slopes", in.alibi_slopes, shape);
  p.scores.sinks = reader.head_numbers("sinks", in.sinks, shape);
  if (!Reader::absent(in.dropout_seeds)) {
    reader.expect(attributes.dropout_steps > 0 && attributes.dropout_steps < 1 << 16, "dropout must be below 2^16");
    const void* seeds = reader.data("dropout_seeds", in.dropout_seeds, ffi::U32, {shape.batch, shape.heads, 2});
    p.scores.dropout = {static_cast<const uint32_t*>(seeds), static_cast<uint32_t>(attributes.dropout_steps)};
  }
  reader.expect(attributes.num_sink_tokens >= 0, "num_sink_tokens must not be negative");
  p.visibility.sink_tokens = attributes.num_sink_tokens;
  p.visibility.q_segments = reader.per_token("query_segment_ids", in.q_segments, shape.batch, shape.q_len);
  p.visibility.k_segments = reader.per_token("key_value_segment_ids", in.k_segments, shape.batch, shape.k_len);
  reader.expect((p.visibility.q_segments == nullptr) == (p.visibility.k_segments == nullptr),
                "query_segment_ids and key_value_segment_ids must be given together");
  if (!Reader::absent(in.spans)) {
    const Dims spans = Reader::dims(in.spans);
    const int64_t count = spans.size() == 3 ? spans[1] : 0;
    p.visibility.span_count = reader.extent("spans", count);
    p.visibility.spans = reader.ints("spans", in.spans, {shape.batch, count, 2});
  }
  if (!Reader::absent(in.cu_q)) {
    const Dims cu = Reader::dims(in.cu_q);
    const int64_t count = cu.size() == 2 ? cu[1] : 0;
    reader.expect(count >= 1, "cu_seqlens_q must be [batch, sequences + 1]");
    p.visibility.sequences = reader.extent("sequences", count) - 1;
    p.visibility.cu_q = reader.per_token("cu_seqlens_q", in.cu_q, shape.batch, count);
    p.visibility.cu_k = reader.per_token("cu_seqlens_k", in.cu_k, shape.batch, count);
    reader.expect(p.visibility.cu_k != nullptr, "cu_seqlens_q and cu_seqlens_k must be given together");
  }
  return p;
}

}  // namespace jfa
