// Runs the package's kernels without Python and XLA, for compute-sanitizer, and checks everything it can by itself.
//   driver [--list] [--case GLOB]... [--small] [--unguarded] [--plant BUG] [soak SECONDS SEED]
#include <fnmatch.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "attention.h"
#include "buffers.h"
#include "cases.h"
#include "planted.cuh"
#include "reference.h"
#include "soak.h"

namespace sanitizer {
namespace {

struct Options {
  std::vector<std::string> globs;
  std::string bug;
  bool list = false, small = false, guarded = true;
  double soak_seconds = 0.0;
  uint64_t seed = 0;
};

// The current one, as plans see it.
jfa::Device current_device() {
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "asking for the device");
  const auto read = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, ordinal), "reading the device's attributes");
    return value;
  };
  jfa::Device device;
  device.compute_capability = 10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = read(cudaDevAttrMultiProcessorCount);
  device.shared_memory_bytes = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

jfa::Tensor tensor(const Buffer* buffer, int64_t rows, int64_t heads, int64_t dim) {
  return {buffer->data(), rows * heads * dim, heads * dim, dim};
}

jfa::ScoreTensor score_tensor(const Buffer* buffer, jfa::ElementType type, const Extents& e) {
  const auto stride = [](int extent, int64_t elements) { return extent == 1 ? 0 : elements; };
  jfa::ScoreTensor t;
  t.data = buffer->data();
  t.type = type;
  t.batch = e[0], t.heads = e[1], t.q_len = e[2], t.k_len = e[3];
  t.batch_stride = stride(e[0], int64_t(e[1]) * e[2] * e[3]);
  t.head_stride = stride(e[1], int64_t(e[2]) * e[3]);
  t.q_stride = stride(e[2], e[3]);
  t.k_stride = e[3] > 1;
  return t;
}

Bytes encode_ints(const std::vector<int>& values) {
  const auto* first = reinterpret_cast<const unsigned char*>(values.data());
  return Bytes(first, first + values.size() * sizeof(int));
}

// The operands of one case on the device.
jfa::Problem upload(const Case& c, const Values& v, Memory& memory) {
  const jfa::Shape& s = c.shape;
  jfa::Problem p;
  p.shape = s;
  p.type = c.type;
  p.q = tensor(memory.input("q", encode(c.type, v.q)), s.q_len, s.heads, s.head_dim);
  p.k = tensor(memory.input("k", encode(c.type, v.k)), s.k_len, s.kv_heads, s.head_dim);
  p.v = tensor(memory.input("v", encode(c.type, v.v)), s.k_len, s.kv_heads, s.value_dim);
  p.scores.scale = c.scale();
  if (!c.device_scale.empty()) {
    p.scores.device_scale = memory.input("scale", encode(jfa::ElementType::kFloat, c.device_scale))->data<float>();
    p.scores.device_scale_stride = c.device_scale.size() > 1;
  }
  if (count(c.bias) > 0) {
    p.scores.bias = score_tensor(memory.input("bias", encode(c.bias_type, v.bias)), c.bias_type, c.bias);
  }
  if (count(c.mask) > 0) {
    const auto type = jfa::ElementType::kBool;
    p.scores.mask = score_tensor(memory.input("mask", encode(type, v.mask)), type, c.mask);
  }
  p.scores.soft_cap = c.soft_cap;
  const auto numbers = [&](const char* name, const std::vector<float>& values) {
    if (values.empty()) return jfa::HeadNumbers{};
    const float* data = memory.input(name, encode(jfa::ElementType::kFloat, values))->data<float>();
    return jfa::HeadNumbers{data, int(values.size()) > s.heads ? s.heads : 0};
  };
  p.scores.alibi_slopes = numbers("alibi_slopes", c.alibi_slopes);
  p.scores.sinks = numbers("sinks", c.sinks);
  if (c.dropout_steps > 0) {
    const std::vector<int> bits(v.seeds.begin(), v.seeds.end());
    p.scores.dropout = {memory.input("dropout_seeds", encode_ints(bits))->data<uint32_t>(), c.dropout_steps};
  }
  p.visibility = c.window;
  const auto ints = [&](const char* name, const std::vector<int>& values) -> const int* {
    return values.empty() ? nullptr : memory.input(name, encode_ints(values))->data<int>();
  };
  p.visibility.q_lengths = ints("q_lengths", c.q_lengths);
  p.visibility.k_lengths = ints("k_lengths", c.k_lengths);
  p.visibility.q_segments = ints("q_segments", c.q_segments);
  p.visibility.k_segments = ints("k_segments", c.k_segments);
  p.visibility.spans = ints("spans", c.spans);
  p.visibility.span_count = static_cast<int>(c.spans.size()) / 2 / s.batch;
  p.visibility.cu_q = ints("cu_q", c.cu_q);
  p.visibility.cu_k = ints("cu_k", c.cu_k);
  p.visibility.sequences = c.cu_q.empty() ? 0 : static_cast<int>(c.cu_q.size()) / s.batch - 1;
  return p;
}

// Waits, looks at every buffer, and returns what the outputs hold.
std::vector<Bytes> finish(const Memory& memory, const std::vector<const Buffer*>& outputs, cudaStream_t stream) {
  check(cudaStreamSynchronize(stream), "running the kernels");
  memory.check_untouched();
  std::vector<Bytes> results;
  for (const Buffer* output : outputs) results.push_back(output->read_written());
  return results;
}

void backward(const Case& c, const Values& v, jfa::Problem p, const std::vector<Bytes>& forward_results,
              Reference& reference, bool deterministic, bool guarded, cudaStream_t stream) {
  const auto kFloat = jfa::ElementType::kFloat;
  const jfa::Shape& s = c.shape;
  Memory memory(guarded);
  jfa::Gradients g;
  p.o = tensor(memory.input("out as input", forward_results[0]), s.q_len, s.heads, s.value_dim);
  p.lse = memory.input("lse as input", forward_results[1])->data<float>();
  g.d_o = tensor(memory.input("d_out", encode(c.type, v.d_o)), s.q_len, s.heads, s.value_dim);
  if (c.d_lse) g.d_lse = memory.input("d_lse", encode(kFloat, v.d_lse))->data<float>();
  g.deterministic = deterministic;

  std::vector<const Buffer*> outputs = {memory.output("dq", v.q.size(), 2), memory.output("dk", v.k.size(), 2),
                                        memory.output("dv", v.v.size(), 2)};
  g.dq = tensor(outputs[0], s.q_len, s.heads, s.head_dim);
  g.dk = tensor(outputs[1], s.k_len, s.kv_heads, s.head_dim);
  g.dv = tensor(outputs[2], s.k_len, s.kv_heads, s.value_dim);
  if (!v.bias.empty()) {
    outputs.push_back(memory.output("d_bias", v.bias.size(), 4));
    g.d_bias = score_tensor(outputs.back(), kFloat, c.bias);
  }
  jfa::Plan plan;
  check(jfa::plan_backward(p, g, c.family, current_device(), plan));
  const Buffer* scratch = memory.output("scratch", plan.scratch_floats, 4);

  check(jfa::backward(p, g, scratch->data<float>(), plan.scratch_floats, c.family, stream));
  const std::vector<Bytes> results = finish(memory, outputs, stream);
  const Expected* expected[] = {&reference.dq, &reference.dk, &reference.dv, &reference.d_bias};
  const char* names[] = {"dq", "dk", "dv", "d_bias"};
  for (size_t n = 0; n < results.size(); ++n) {
    compare(std::string(names[n]) + (deterministic ? " (deterministic)" : ""),
            decode(n < 3 ? c.type : kFloat, results[n]), *expected[n]);
  }
  if (!deterministic || !guarded) return;
  memory.poison();
  check(jfa::backward(p, g, scratch->data<float>(), plan.scratch_floats, c.family, stream));
  if (finish(memory, outputs, stream) != results) throw std::runtime_error("a second deterministic backward differs");
}

// Throws std::exception saying what is wrong.
void run_case(const Case& c, bool guarded, double scale_error, cudaStream_t stream) {
  const Values v(c);
  Memory memory(guarded);
  jfa::Problem p = upload(c, v, memory);
  jfa::Plan plan;
  check(jfa::plan_forward(p, c.family, current_device(), plan));
  const std::vector<const Buffer*> outputs = {
      memory.output("out", v.d_o.size(), 2, plan.family == "sm90"),
      memory.output("lse", size_t(c.shape.batch) * c.shape.heads * c.shape.q_len, 4)};
  p.o = tensor(outputs[0], c.shape.q_len, c.shape.heads, c.shape.value_dim);
  p.lse = outputs[1]->data<float>();
  const Buffer* scratch = memory.output("scratch", plan.scratch_floats, 4);
  check(jfa::forward(p, scratch->data<float>(), plan.scratch_floats, c.family, stream));
  const std::vector<Bytes> results = finish(memory, outputs, stream);

  Reference reference(c, v, scale_error);
  reference.forward();
  const auto out = decode(c.type, results[0]), lse = decode(jfa::ElementType::kFloat, results[1]);
  compare("out", out, reference.out);
  compare("lse", lse, reference.lse);
  if (guarded) {  // a tool sees nothing new in a second run
    memory.poison();
    check(jfa::forward(p, scratch->data<float>(), plan.scratch_floats, c.family, stream));
    if (finish(memory, outputs, stream) != results) throw std::runtime_error("a second forward differs");
  }

  if (!c.gradients) return;
  reference.backward(out, lse);
  for (const bool deterministic : {false, true}) {
    const bool same_kernels = plan.family == "sm90" && plan.head_dim > 128;
    if (deterministic && same_kernels && !guarded) continue;
    backward(c, v, p, results, reference, deterministic, guarded, stream);
  }
}

bool matches(const std::string& name, const std::vector<std::string>& globs) {
  for (const std::string& glob : globs) {
    if (fnmatch(glob.c_str(), name.c_str(), 0) == 0) return true;
  }
  return globs.empty();
}

// True where it passes; says so on standard output.
template <class F>
bool report(const std::string& name, F&& f) {
  std::string what = "ok";
  try {
    f();
  } catch (const std::exception& error) {
    what = std::string("FAILED: ") + error.what();
  }
  std::printf("%s: %s\n", name.c_str(), what.c_str());
  std::fflush(stdout);
  return what == "ok";
}

int run(const Options& options) {
  if (options.soak_seconds > 0.0) return soak(options.soak_seconds, options.seed, options.bug, current_device());
  std::vector<Case> chosen;
  for (const Case& c : all_cases(options.small)) {
    if (matches(c.name, options.globs)) chosen.push_back(c);
  }
  if (chosen.empty()) {
    std::fprintf(stderr, "no case has such a name; --list shows all\n");
    return 2;
  }
  if (options.list) {
    for (const Case& c : chosen) std::printf("%s\n", c.name.c_str());
    return 0;
  }
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  int failed = 0;
  if (!options.bug.empty() && options.bug != "wrong_scale") {
    failed = !report(options.bug, [&] { run_planted(options.bug, options.guarded, stream); });
  } else {
    const double scale_error = options.bug.empty() ? 1.0 : 1.05;
    for (const Case& c : chosen) {
      failed += !report(c.name, [&] { run_case(c, options.guarded, scale_error, stream); });
      if (cudaPeekAtLastError() != cudaSuccess) break;  // the device takes nothing more from this process
    }
    std::printf("%zu cases, %d failed\n", chosen.size(), failed);
  }
  check(cudaStreamDestroy(stream), "destroying the stream");
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace sanitizer

int main(int argc, char** argv) {
  sanitizer::Options options;
  for (int n = 1; n < argc; ++n) {
    const std::string argument = argv[n];
    const bool has_value = n + 1 < argc;
    if (argument == "--list") {
      options.list = true;
    } else if (argument == "--small") {
      options.small = true;
    } else if (argument == "--unguarded") {
      options.guarded = false;
    } else if (argument == "--case" && has_value) {
      options.globs.push_back(argv[++n]);
    } else if (argument == "--plant" && has_value) {
      options.bug = argv[++n];
    } else if (argument == "soak" && n + 2 < argc && std::atof(argv[n + 1]) > 0.0) {
      options.soak_seconds = std::atof(argv[++n]);
      options.seed = std::strtoull(argv[++n], nullptr, 10);
    } else {
      std::fprintf(stderr,
                   "usage: %s [--list] [--case GLOB]... [--small] [--unguarded] [--plant BUG] [soak SECONDS SEED]\n",
                   argv[0]);
      return 2;
    }
  }
  try {
    return sanitizer::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "FAILED: %s\n", error.what());
    return 1;
  }
}
