// The only file that sees XLA: buffers and attributes of a custom call become a Problem, and nanobind hands the
// handlers to Python. Everything is checked again here, since an exported program does not pass through Python.
//
// The handlers only enqueue work on XLA's stream, in memory that XLA gave; they carry the command-buffer trait, so XLA
// may capture them into CUDA graphs.
#include "xla/ffi/api/ffi.h"

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "attention.h"

namespace jfa {
namespace {

namespace nb = nanobind;
namespace ffi = xla::ffi;

using Dims = std::vector<int64_t>;

std::string text(const Dims& dims) {
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

  int extent(const char* what, int64_t value) {
    expect(value <= kUnbounded, std::string(what) + " is " + std::to_string(value) + ", more than 2147483647");
    return static_cast<int>(value);
  }
};

struct Attributes {
  float scale;
  int32_t window_left, window_right;
  bool bottom_right;
  std::string_view family;
};

struct Operands {
  ffi::AnyBuffer q, k, v, bias, mask, scale, q_lengths, k_lengths;
};

Problem read_problem(Reader& reader, const Operands& in, const ffi::AnyBuffer& o, const ffi::AnyBuffer& lse,
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
  return p;
}

ffi::Error to_ffi(const Status& status) {
  switch (status.code) {
    case Status::Code::kOk:
      return ffi::Error::Success();
    case Status::Code::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message);
    case Status::Code::kUnimplemented:
      return ffi::Error(ffi::ErrorCode::kUnimplemented, status.message);
    case Status::Code::kInternal:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message);
}

// XLA runs handlers with the stream's device current, as a rule; a launch on another one would fail.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal) {
    if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != ordinal)
      restore_ = cudaSetDevice(ordinal) == cudaSuccess;
  }
  ~CurrentDevice() {
    if (restore_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

ffi::Error run_forward(cudaStream_t stream, int32_t device, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::AnyBuffer bias, ffi::AnyBuffer mask, ffi::AnyBuffer scale_operand, ffi::AnyBuffer q_lengths,
                       ffi::AnyBuffer k_lengths, ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer> lse,
                       float scale, int32_t window_left, int32_t window_right, bool bottom_right,
                       std::string_view family) {
  Reader reader;
  const Problem p = read_problem(reader, {q, k, v, bias, mask, scale_operand, q_lengths, k_lengths}, *o, *lse,
                                 {scale, window_left, window_right, bottom_right, family});
  if (!reader.status.ok()) return to_ffi(reader.status);
  const CurrentDevice current(device);
  return to_ffi(forward(p, std::string(family), stream));
}

ffi::Error run_backward(cudaStream_t stream, int32_t device, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::AnyBuffer bias, ffi::AnyBuffer mask, ffi::AnyBuffer scale_operand,
                        ffi::AnyBuffer q_lengths, ffi::AnyBuffer k_lengths, ffi::AnyBuffer o, ffi::AnyBuffer lse,
                        ffi::AnyBuffer d_o, ffi::AnyBuffer d_lse, ffi::Result<ffi::AnyBuffer> dq,
                        ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                        ffi::Result<ffi::AnyBuffer> d_bias, ffi::Result<ffi::AnyBuffer> scratch, float scale,
                        int32_t window_left, int32_t window_right, bool bottom_right, std::string_view family,
                        bool deterministic) {
  Reader reader;
  const Problem p = read_problem(reader, {q, k, v, bias, mask, scale_operand, q_lengths, k_lengths}, o, lse,
                                 {scale, window_left, window_right, bottom_right, family});
  if (!reader.status.ok()) return to_ffi(reader.status);
  Gradients g;
  const ffi::DataType type = q.element_type();
  g.d_o = reader.tensor("d_out", d_o, type, Reader::dims(o));
  g.dq = reader.tensor("d_query", *dq, type, Reader::dims(q));
  g.dk = reader.tensor("d_key", *dk, type, Reader::dims(k));
  g.dv = reader.tensor("d_value", *dv, type, Reader::dims(v));
  if (!Reader::absent(d_lse)) {
    g.d_lse = static_cast<const float*>(reader.data("d_lse", d_lse, ffi::F32, Reader::dims(lse)));
  }
  if (!Reader::absent(*d_bias)) {
    reader.expect(p.scores.bias.data != nullptr && Reader::dims(*d_bias) == Reader::dims(bias) &&
                      d_bias->element_type() == ffi::F32,
                  "d_bias must be float32 of the bias's shape");
    g.d_bias = reader.score_tensor("d_bias", *d_bias, p.shape);
  }
  g.deterministic = deterministic;
  const int64_t scratch_floats = static_cast<int64_t>(scratch->element_count());
  float* scratch_data = static_cast<float*>(reader.data("scratch", *scratch, ffi::F32, {scratch_floats}));
  if (!reader.status.ok()) return to_ffi(reader.status);
  const CurrentDevice current(device);
  return to_ffi(backward(p, g, scratch_data, scratch_floats, std::string(family), stream));
}

auto forward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Arg<ffi::AnyBuffer>()   // query [B,T,N,H]
      .Arg<ffi::AnyBuffer>()   // key [B,S,K,H]
      .Arg<ffi::AnyBuffer>()   // value [B,S,K,Hv]
      .Arg<ffi::AnyBuffer>()   // bias, broadcasts to [B,N,T,S]; absent: shape [0], like the following
      .Arg<ffi::AnyBuffer>()   // mask
      .Arg<ffi::AnyBuffer>()   // scale [1] or [B]
      .Arg<ffi::AnyBuffer>()   // query lengths [B]
      .Arg<ffi::AnyBuffer>();  // key lengths [B]
}

XLA_FFI_DEFINE_HANDLER(kForward, run_forward,
                       forward_binding()
                           .Ret<ffi::AnyBuffer>()  // out [B,T,N,Hv]
                           .Ret<ffi::AnyBuffer>()  // lse [B,N,T]
                           .Attr<float>("scale")
                           .Attr<int32_t>("window_left")
                           .Attr<int32_t>("window_right")
                           .Attr<bool>("bottom_right")
                           .Attr<std::string_view>("family"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kBackward, run_backward,
                       forward_binding()
                           .Arg<ffi::AnyBuffer>()  // out
                           .Arg<ffi::AnyBuffer>()  // lse
                           .Arg<ffi::AnyBuffer>()  // d_out
                           .Arg<ffi::AnyBuffer>()  // d_lse, may be absent
                           .Ret<ffi::AnyBuffer>()  // d_query
                           .Ret<ffi::AnyBuffer>()  // d_key
                           .Ret<ffi::AnyBuffer>()  // d_value
                           .Ret<ffi::AnyBuffer>()  // d_bias, may be absent
                           .Ret<ffi::AnyBuffer>()  // scratch [n] f32
                           .Attr<float>("scale")
                           .Attr<int32_t>("window_left")
                           .Attr<int32_t>("window_right")
                           .Attr<bool>("bottom_right")
                           .Attr<std::string_view>("family")
                           .Attr<bool>("deterministic"),
                       {ffi::Traits::kCmdBufferCompatible});

nb::capsule capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict plan(bool is_backward, int batch, int q_len, int k_len, int heads, int kv_heads, int head_dim, int value_dim,
              bool bf16, bool general, bool bias_gradient, bool deterministic, const std::string& family,
              int64_t shared_memory_bytes) {
  Problem p;
  p.shape = {batch, q_len, k_len, heads, kv_heads, head_dim, value_dim};
  p.type = bf16 ? ElementType::kBfloat16 : ElementType::kHalf;
  Gradients g;
  float present = 0.0f;
  if (general) p.scores.mask.data = &present;
  if (bias_gradient) g.d_bias.data = &present;
  g.deterministic = deterministic;
  Plan made;
  const Status status = is_backward ? plan_backward(p, g, family, shared_memory_bytes, made)
                                    : plan_forward(p, family, shared_memory_bytes, made);
  if (!status.ok()) throw nb::value_error(status.message.c_str());
  nb::dict out;
  out["family"] = made.family;
  out["head_dim"] = made.head_dim;
  out["q_tile"] = made.q_tile;
  out["k_tile"] = made.k_tile;
  out["warps"] = made.warps;
  out["splits"] = made.splits;
  out["shared_memory_bytes"] = made.shared_memory_bytes;
  out["scratch_floats"] = made.scratch_floats;
  out["why"] = made.why;
  return out;
}

nb::dict build_info() {
  nb::list head_dims;
  for (const int dim : {JFA_HEAD_DIMS}) head_dims.append(dim);
  nb::list families;
  families.append("sm80");
  nb::dict out;
  out["families"] = families;
  out["head_dims"] = head_dims;
  out["architectures"] = JFA_BUILD_ARCHITECTURES;
  out["cuda"] = JFA_BUILD_CUDA;
  return out;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.attr("xla_ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("handlers", [] {
    nb::dict out;
    out["jax_flashattn_fwd_v1"] = capsule(kForward);
    out["jax_flashattn_bwd_v1"] = capsule(kBackward);
    return out;
  });
  m.def("build_info", &build_info);
  m.def("plan", &plan, nb::arg("backward"), nb::arg("batch"), nb::arg("q_len"), nb::arg("k_len"), nb::arg("heads"),
        nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("value_dim"), nb::arg("bf16"), nb::arg("general"),
        nb::arg("bias_gradient"), nb::arg("deterministic"), nb::arg("family"), nb::arg("shared_memory_bytes"));
}

}  // namespace jfa
