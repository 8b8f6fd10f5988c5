// The only file, with ffi_problem.h, that sees XLA: buffers and attributes of a custom call become a Problem, and
// nanobind hands the handlers to Python.
//
// The handlers only enqueue work on XLA's stream, in memory that XLA gave; they carry the command-buffer trait, so XLA
// may capture them into CUDA graphs.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "attention.h"
#include "ffi_problem.h"
#include "sm90/family.h"

namespace jfa {
namespace {

namespace nb = nanobind;

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
                       ffi::AnyBuffer k_lengths, ffi::AnyBuffer alibi_slopes, ffi::AnyBuffer sinks,
                       ffi::AnyBuffer dropout_seeds, ffi::AnyBuffer q_segments, ffi::AnyBuffer k_segments,
                       ffi::AnyBuffer spans, ffi::AnyBuffer cu_q, ffi::AnyBuffer cu_k, ffi::Result<ffi::AnyBuffer> o,
                       ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> scratch, float scale,
                       int32_t window_left, int32_t window_right, bool bottom_right, float soft_cap,
                       int32_t num_sink_tokens, int32_t dropout_steps, std::string_view family) {
  Reader reader;
  const Problem p = read_problem(
      reader,
      {q, k, v, bias, mask, scale_operand, q_lengths, k_lengths, alibi_slopes, sinks, dropout_seeds, q_segments,
       k_segments, spans, cu_q, cu_k},
      *o, *lse, {scale, window_left, window_right, bottom_right, soft_cap, num_sink_tokens, dropout_steps, family});
  if (!reader.status.ok()) return to_ffi(reader.status);
  const int64_t scratch_floats = static_cast<int64_t>(scratch->element_count());
  float* scratch_data = static_cast<float*>(reader.data("scratch", *scratch, ffi::F32, {scratch_floats}));
  if (!reader.status.ok()) return to_ffi(reader.status);
  const CurrentDevice current(device);
  return to_ffi(forward(p, scratch_data, scratch_floats, std::string(family), stream));
}

ffi::Error run_backward(cudaStream_t stream, int32_t device, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::AnyBuffer bias, ffi::AnyBuffer mask, ffi::AnyBuffer scale_operand,
                        ffi::AnyBuffer q_lengths, ffi::AnyBuffer k_lengths, ffi::AnyBuffer alibi_slopes,
                        ffi::AnyBuffer sinks, ffi::AnyBuffer dropout_seeds, ffi::AnyBuffer q_segments,
                        ffi::AnyBuffer k_segments, ffi::AnyBuffer spans, ffi::AnyBuffer cu_q, ffi::AnyBuffer cu_k,
                        ffi::AnyBuffer o, ffi::AnyBuffer lse, ffi::AnyBuffer d_o, ffi::AnyBuffer d_lse,
                        ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                        ffi::Result<ffi::AnyBuffer> d_bias, ffi::Result<ffi::AnyBuffer> scratch, float scale,
                        int32_t window_left, int32_t window_right, bool bottom_right, float soft_cap,
                        int32_t num_sink_tokens, int32_t dropout_steps, std::string_view family, bool deterministic) {
  Reader reader;
  const Problem p = read_problem(
      reader,
      {q, k, v, bias, mask, scale_operand, q_lengths, k_lengths, alibi_slopes, sinks, dropout_seeds, q_segments,
       k_segments, spans, cu_q, cu_k},
      o, lse, {scale, window_left, window_right, bottom_right, soft_cap, num_sink_tokens, dropout_steps, family});
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
      .Arg<ffi::AnyBuffer>()   // key lengths [B]
      .Arg<ffi::AnyBuffer>()   // ALiBi slopes [B or 1,N]
      .Arg<ffi::AnyBuffer>()   // sinks [B or 1,N]
      .Arg<ffi::AnyBuffer>()   // dropout seeds [B,N,2]
      .Arg<ffi::AnyBuffer>()   // query segment ids [B,T]
      .Arg<ffi::AnyBuffer>()   // key segment ids [B,S]
      .Arg<ffi::AnyBuffer>()   // spans [B,R,2]
      .Arg<ffi::AnyBuffer>()   // where packed sequences of queries begin [B,n+1]
      .Arg<ffi::AnyBuffer>();  // and of keys
}

XLA_FFI_DEFINE_HANDLER(kForward, run_forward,
                       forward_binding()
                           .Ret<ffi::AnyBuffer>()  // out [B,T,N,Hv]
                           .Ret<ffi::AnyBuffer>()  // lse [B,N,T]
                           .Ret<ffi::AnyBuffer>()  // scratch [n] f32
                           .Attr<float>("scale")
                           .Attr<int32_t>("window_left")
                           .Attr<int32_t>("window_right")
                           .Attr<bool>("bottom_right")
                           .Attr<float>("soft_cap")
                           .Attr<int32_t>("num_sink_tokens")
                           .Attr<int32_t>("dropout_steps")
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
                           .Attr<float>("soft_cap")
                           .Attr<int32_t>("num_sink_tokens")
                           .Attr<int32_t>("dropout_steps")
                           .Attr<std::string_view>("family")
                           .Attr<bool>("deterministic"),
                       {ffi::Traits::kCmdBufferCompatible});

nb::capsule capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict plan(bool is_backward, int batch, int q_len, int k_len, int heads, int kv_heads, int head_dim, int value_dim,
              bool bf16, const nb::tuple& mask, bool device_scale, const nb::tuple& bias, bool has_lengths,
              bool soft_cap, int num_sink_tokens, bool alibi_slopes, bool sinks, bool dropout_seeds,
              bool query_segment_ids, bool spans, int sequences, int window_left, int window_right, bool bias_gradient,
              bool deterministic, const std::string& family, int compute_capability, int64_t shared_memory_bytes) {
  Problem p;
  p.shape = {batch, q_len, k_len, heads, kv_heads, head_dim, value_dim};
  p.type = bf16 ? ElementType::kBfloat16 : ElementType::kHalf;
  p.visibility.window_left = window_left;
  p.visibility.window_right = window_right;
  Gradients g;
  alignas(16) float present = 0.0f;
  const int length = 0;
  const uint32_t seed = 0;
  if (nb::len(mask) != 0) {
    p.scores.mask.data = &present;
    p.scores.mask.type = ElementType::kBool;
    p.scores.mask.q_len = nb::cast<int>(mask[0]);
    p.scores.mask.k_len = nb::cast<int>(mask[1]);
  }
  if (device_scale) p.scores.device_scale = &present;
  if (nb::len(bias) != 0) {
    p.scores.bias.data = &present;
    p.scores.bias.type = nb::cast<bool>(bias[0]) ? p.type : ElementType::kFloat;
    p.scores.bias.q_len = nb::cast<int>(bias[1]);
    p.scores.bias.k_len = nb::cast<int>(bias[2]);
  }
  if (has_lengths) p.visibility.k_lengths = &length;
  if (soft_cap) p.scores.soft_cap = 1.0f;
  if (alibi_slopes) p.scores.alibi_slopes.data = &present;
  if (sinks) p.scores.sinks.data = &present;
  if (dropout_seeds) p.scores.dropout.seeds = &seed;
  p.visibility.sink_tokens = num_sink_tokens;
  if (query_segment_ids) p.visibility.q_segments = p.visibility.k_segments = &length;
  if (spans) p.visibility.spans = &length;
  if (sequences >= 0) {  // packed ones; they are not counted where there are none
    p.visibility.cu_q = p.visibility.cu_k = &length;
    p.visibility.sequences = sequences;
  }
  if (bias_gradient) g.d_bias.data = &present;
  g.deterministic = deterministic;
  Device device;
  device.compute_capability = compute_capability;
  device.shared_memory_bytes = shared_memory_bytes;
  Plan made;
  const Status status = is_backward ? plan_backward(p, g, family, device, made) : plan_forward(p, family, device, made);
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
  out["schedule"] = made.schedule;
  out["why"] = made.why;
  return out;
}

nb::dict build_info() {
  nb::list head_dims;
  for (const int dim : {JFA_HEAD_DIMS}) head_dims.append(dim);
  nb::list families;
  families.append("sm80");
  if (sm90::kBuilt) families.append("sm90");
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
    out["jax_flashattn_fwd_v2"] = capsule(kForward);
    out["jax_flashattn_bwd_v2"] = capsule(kBackward);
    return out;
  });
  m.def("build_info", &build_info);
  m.def("plan", &plan, nb::arg("backward"), nb::arg("batch"), nb::arg("q_len"), nb::arg("k_len"), nb::arg("heads"),
        nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("value_dim"), nb::arg("bf16"), nb::arg("mask"),
        nb::arg("device_scale"), nb::arg("bias"), nb::arg("has_lengths"), nb::arg("soft_cap"),
        nb::arg("num_sink_tokens"), nb::arg("alibi_slopes"), nb::arg("sinks"), nb::arg("dropout_seeds"),
        nb::arg("query_segment_ids"), nb::arg("spans"), nb::arg("sequences"), nb::arg("window_left"),
        nb::arg("window_right"), nb::arg("bias_gradient"), nb::arg("deterministic"), nb::arg("family"),
        nb::arg("compute_capability"), nb::arg("shared_memory_bytes"));
}

}  // namespace jfa
