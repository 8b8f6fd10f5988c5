// The package's calls on the emulator: all of csrc but ffi.cc, with only the launch itself replaced.
// One library holds one pass of one family for one compiled head dim: JFA_HEAD_DIMS, JFA_FAMILY (80 or 90), and
// JFA_BACKWARD (0 or 1). The gradient of a bias is one of the backward's.
#define JFA_SM90

// Launching on a GPU goes out of the way of launching here. The launchers find whichever jfa::launch comes first.
#define launch launch_on_gpu
#include "launch.h"
#undef launch

#include "api.h"

namespace jfa {

// What stands behind a cudaStream_t.
struct EmulatedStream {
  Session& session;
  emulator::GlobalMemory& memory;
};

template <class... Parameters, class... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
              const Arguments&... arguments) {
  const EmulatedStream& on = *reinterpret_cast<EmulatedStream*>(stream);
  emulator::launch(
      on.session, on.memory, int(grid.blocks), grid.threads, grid.shared_bytes, [&] { kernel(arguments...); },
      grid.cluster);
  return on.session.fault[0] == '\0' ? Status::Ok() : Status::Internal(std::string(name) + ": " + on.session.fault);
}

inline Status left_out() { return Status::Unimplemented("this library holds another pass, family or tile"); }

constexpr int kSharedBytes = 232448;  // of a block

// How many the device says it has, to calls of this host thread.
inline int& multiprocessors() {
  static thread_local int count = 0;
  return count;
}

}  // namespace jfa

// The parts of the CUDA runtime that launchers use. emulator.py links so that no other library's can take their place.
extern "C" cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t stream) {
  const bool inside = reinterpret_cast<jfa::EmulatedStream*>(stream)->memory.set(p, byte, bytes);
  return inside ? cudaSuccess : cudaErrorInvalidValue;
}
extern "C" const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "the emulator has no such thing"; }
extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = jfa::multiprocessors();
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = jfa::kSharedBytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

#include "choices.h"
// Below that, which has functions of family.h go out of the way.
#include "attention.cc"

#if JFA_BACKWARD
#include "sm80/launch_bias.cuh"
#else
template <int kHeadDim>
jfa::Status jfa::sm80::launch_bias(const Problem&, const Gradients&, cudaStream_t) {
  return left_out();
}
#endif

#if JFA_FAMILY == 80 && !JFA_BACKWARD
#include "sm80/launch_forward.cuh"
#else
template <int kHeadDim>
jfa::Status jfa::sm80::launch_forward(const Problem&, cudaStream_t) {
  return left_out();
}
#endif

#if JFA_FAMILY == 80 && JFA_BACKWARD
#include "sm80/launch_backward.cuh"
#else
template <int kHeadDim>
jfa::Status jfa::sm80::launch_backward(const Problem&, const Gradients&, cudaStream_t) {
  return left_out();
}
#endif

#if JFA_FAMILY == 90 && !JFA_BACKWARD
#include "sm90/launch_forward.cuh"
#else
template <int kHeadDim>
jfa::Status jfa::sm90::launch_forward(const Problem&, uint32_t*, int, cudaStream_t) {
  return left_out();
}
#endif

#if JFA_FAMILY == 90 && JFA_BACKWARD
#include "sm90/launch_backward.cuh"
#include "sm90/launch_bias.cuh"
#else
template <int kHeadDim>
jfa::Status jfa::sm90::launch_bias(const Problem&, const Gradients&, int, cudaStream_t) {
  return left_out();
}
template <int kHeadDim>
jfa::Status jfa::sm90::launch_backward(const Problem&, const Gradients&, int, cudaStream_t) {
  return left_out();
}
#endif

namespace {

// Mirrored in kernels.py. Arrays are dense and in the order of problem.h's comments; null: absent.
struct ScoreArray {
  void* data;
  int32_t type, batch, heads, q_len, k_len, unused;
};
struct Call {
  int32_t batch, q_len, k_len, heads, kv_heads, head_dim, value_dim;
  int32_t bf16, deterministic, window_left, window_right, bottom_right;
  int32_t num_sink_tokens, dropout_steps, span_count, sequences, slopes_by_entry, sinks_by_entry;
  void *q, *k, *v, *o, *lse, *device_scale, *q_lengths, *k_lengths, *d_o, *dq, *dk, *dv, *d_lse, *scratch;
  void *alibi_slopes, *sinks, *dropout_seeds, *q_segments, *k_segments, *spans, *cu_q, *cu_k;
  ScoreArray bias, mask, d_bias;
  int64_t scratch_floats;
  float scale, soft_cap;
};

jfa::Tensor tensor(void* data, int64_t rows, int64_t heads, int64_t dim) {
  return {data, rows * heads * dim, heads * dim, dim};
}

jfa::ScoreTensor score_tensor(const ScoreArray& a) {
  const int64_t plane = int64_t(a.q_len) * a.k_len;
  const auto stride = [](int extent, int64_t elements) -> int64_t { return extent == 1 ? 0 : elements; };
  jfa::ScoreTensor t;
  t.data = a.data;
  t.type = static_cast<jfa::ElementType>(a.type);
  t.batch = a.batch;
  t.heads = a.heads;
  t.q_len = a.q_len;
  t.k_len = a.k_len;
  t.batch_stride = stride(a.batch, a.heads * plane);
  t.head_stride = stride(a.heads, plane);
  t.q_stride = stride(a.q_len, a.k_len);
  t.k_stride = stride(a.k_len, 1);
  return t;
}

jfa::Problem problem_of(const Call& c) {
  jfa::Problem p;
  p.shape.batch = c.batch;
  p.shape.q_len = c.q_len;
  p.shape.k_len = c.k_len;
  p.shape.heads = c.heads;
  p.shape.kv_heads = c.kv_heads;
  p.shape.head_dim = c.head_dim;
  p.shape.value_dim = c.value_dim;
  p.type = c.bf16 ? jfa::ElementType::kBfloat16 : jfa::ElementType::kHalf;
  p.q = tensor(c.q, c.q_len, c.heads, c.head_dim);
  p.k = tensor(c.k, c.k_len, c.kv_heads, c.head_dim);
  p.v = tensor(c.v, c.k_len, c.kv_heads, c.value_dim);
  p.o = tensor(c.o, c.q_len, c.heads, c.value_dim);
  p.lse = static_cast<float*>(c.lse);
  p.scores.scale = c.scale;
  p.scores.device_scale = static_cast<float*>(c.device_scale);
  p.scores.bias = score_tensor(c.bias);
  p.scores.mask = score_tensor(c.mask);
  p.visibility.window_left = c.window_left;
  p.visibility.window_right = c.window_right;
  p.visibility.bottom_right = c.bottom_right != 0;
  p.visibility.q_lengths = static_cast<int*>(c.q_lengths);
  p.visibility.k_lengths = static_cast<int*>(c.k_lengths);
  p.scores.soft_cap = c.soft_cap;
  p.scores.alibi_slopes = {static_cast<float*>(c.alibi_slopes), c.slopes_by_entry ? c.heads : 0};
  p.scores.sinks = {static_cast<float*>(c.sinks), c.sinks_by_entry ? c.heads : 0};
  p.scores.dropout = {static_cast<uint32_t*>(c.dropout_seeds), uint32_t(c.dropout_steps)};
  p.visibility.sink_tokens = c.num_sink_tokens;
  p.visibility.q_segments = static_cast<int*>(c.q_segments);
  p.visibility.k_segments = static_cast<int*>(c.k_segments);
  p.visibility.spans = static_cast<int*>(c.spans);
  p.visibility.span_count = c.span_count;
  p.visibility.cu_q = static_cast<int*>(c.cu_q);
  p.visibility.cu_k = static_cast<int*>(c.cu_k);
  p.visibility.sequences = c.sequences;
  return p;
}

jfa::Gradients gradients_of(const Call& c) {
  jfa::Gradients g;
  g.d_o = tensor(c.d_o, c.q_len, c.heads, c.value_dim);
  g.dq = tensor(c.dq, c.q_len, c.heads, c.head_dim);
  g.dk = tensor(c.dk, c.k_len, c.kv_heads, c.head_dim);
  g.dv = tensor(c.dv, c.k_len, c.kv_heads, c.value_dim);
  g.d_lse = static_cast<float*>(c.d_lse);
  g.d_bias = score_tensor(c.d_bias);
  g.deterministic = c.deterministic != 0;
  return g;
}

void report(Session& session, const jfa::Status& status) {
  if (!status.ok()) snprintf(session.fault, sizeof(session.fault), "%s", std::string(status.message).c_str());
}

jfa::Plan plan_of(Session& session, const Call& call, const char* family, bool is_backward) {
  const jfa::Device device = {90, int(session.multiprocessors), jfa::kSharedBytes};
  const jfa::Problem p = problem_of(call);
  jfa::Plan plan;
  report(session, is_backward ? jfa::plan_backward(p, gradients_of(call), family, device, plan)
                              : jfa::plan_forward(p, family, device, plan));
  return plan;
}

}  // namespace

extern "C" uint64_t call_bytes() { return sizeof(Call); }

// A mutant of the Hopper family needs no other kernels for this call's forward or backward: the value of JFA_CHOICES.
extern "C" const char* choices(const Session* session, const Call* call, int is_backward) {
  static thread_local std::string list;
  list = jfa::sm90::choices<JFA_HEAD_DIMS>(problem_of(*call), is_backward != 0, int(session->multiprocessors));
  return list.c_str();
}

// That of the forward or the backward; the text lives until the thread asks again.
extern "C" int64_t scratch_floats(Session* session, const Call* call, const char* family, int is_backward) {
  return plan_of(*session, *call, family, is_backward != 0).scratch_floats;
}
extern "C" const char* schedule(Session* session, const Call* call, const char* family, int is_backward) {
  static thread_local std::string text;
  text = plan_of(*session, *call, family, is_backward != 0).schedule;
  return text.c_str();
}

extern "C" void attention_forward(Session* session, emulator::GlobalMemory* memory, const Call* call,
                                  const char* family) {
  jfa::multiprocessors() = int(session->multiprocessors);
  jfa::EmulatedStream stream = {*session, *memory};
  report(*session, jfa::forward(problem_of(*call), static_cast<float*>(call->scratch), call->scratch_floats, family,
                                reinterpret_cast<cudaStream_t>(&stream)));
}

extern "C" void attention_backward(Session* session, emulator::GlobalMemory* memory, const Call* call,
                                   const char* family) {
  jfa::multiprocessors() = int(session->multiprocessors);
  jfa::EmulatedStream stream = {*session, *memory};
  report(*session, jfa::backward(problem_of(*call), gradients_of(*call), static_cast<float*>(call->scratch),
                                 call->scratch_floats, family, reinterpret_cast<cudaStream_t>(&stream)));
}
