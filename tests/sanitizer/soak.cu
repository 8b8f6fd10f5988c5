// Random calls, family auto, from two threads on a stream each; more than half of them have gradients. Each call runs
// twice, into outputs of ones, and the two must agree in every bit (dQ, where it may be summed in any order, but for
// the last place); every 20th is compared with attention by its definition. A call that does not end is named, and ends
// the process.
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "buffers.h"
#include "soak.cuh"
#include "soak.h"
#include "soak_call.h"
#include "soak_gradients.cuh"

namespace sanitizer {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kRows = kOperandElements / 8;
constexpr int kReferenceEvery = 20;
constexpr size_t kBandBytes = 4096 + 16;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What the threads share.
struct Session {
  uint64_t seed;
  std::string bug;
  jfa::Device device;
  Clock::time_point start = Clock::now(), end;
  double limit = 20.0;   // seconds that a call may take
  void* pool = nullptr;  // of inputs: kPool numbers in float16, then as many in bfloat16
  std::atomic<int64_t> calls{0}, judged{0}, failed{0};
  std::atomic<bool> stop{false};
  std::mutex printing;

  static constexpr int64_t kPool = 2 * kOperandElements;

  void say(const std::string& text) {
    const std::lock_guard<std::mutex> lock(printing);
    std::printf("%s\n", text.c_str());
    std::fflush(stdout);
  }
  // The device takes nothing more from this process, or never answers.
  [[noreturn]] void give_up(const std::string& text) {
    say("FAILED: " + text);
    std::_Exit(1);
  }
};

// Memory that ends with the process.
template <class T>
T* allocate(size_t bytes, bool on_host = false) {
  void* memory = nullptr;
  check(on_host ? cudaMallocHost(&memory, bytes) : cudaMalloc(&memory, bytes), "allocating");
  return static_cast<T*>(memory);
}

class Worker {
 public:
  Worker(Session& session, int number) : session_(session), random_(session.seed * 2 + number) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
    for (auto& run : results_) {
      for (int n = 0; n < Verdict::kResults; ++n) {
        run[n] = allocate<unsigned char>((n == Verdict::kLse ? 4 * kRows : 2 * kOperandElements) + 2 * kBandBytes);
      }
    }
    scratch_ = allocate<float>(kScratchFloats * sizeof(float));
    lengths_ = allocate<int>(2 * kMostBounds * sizeof(int));
    scale_ = allocate<float>(sizeof(float));
    verdict_ = allocate<Verdict>(sizeof(Verdict));
    found_ = allocate<Verdict>(sizeof(Verdict), true);
    host_lengths_ = allocate<int>(2 * kMostBounds * sizeof(int), true);
    const float scale = static_cast<float>(kScaleOnDevice);
    check(cudaMemcpyAsync(scale_, &scale, sizeof(scale), cudaMemcpyHostToDevice, stream_), "writing the scale");
    check(cudaStreamSynchronize(stream_), "writing the scale");
  }

  void run() {
    while (!session_.stop && Clock::now() < session_.end) {
      const uint64_t seed = random_();
      const Call call(seed);
      text_ = call.text();
      const bool judged = session_.calls++ % kReferenceEvery == 0;
      std::string wrong;
      try {
        wrong = run(call, judged, seed);
      } catch (const std::exception& error) {
        session_.give_up(error.what() + (": " + text_));
      }
      session_.judged += judged;
      if (wrong.empty()) continue;
      ++session_.failed;
      session_.say("FAILED: " + wrong + ": " + text_);
      if (session_.failed >= 10 || !session_.bug.empty()) session_.stop = true;
    }
  }

 private:
  static constexpr int64_t kScratchFloats = 1 << 28;  // a call that needs more runs without gradients

  // Says what is wrong, if anything is.
  std::string run(const Call& call, bool judged, uint64_t seed) {
    const jfa::Shape& s = call.shape;
    jfa::Gradients g;
    jfa::Problem p = problem(call, seed, g);
    jfa::Plan forward, plan;
    check(jfa::plan_forward(p, "auto", session_.device, forward));
    check(jfa::plan_backward(p, g, "auto", session_.device, plan));
    const bool gradients = call.gradients != Call::kNone && plan.scratch_floats <= kScratchFloats;
    const int64_t keys = int64_t(s.batch) * s.k_len * s.kv_heads;
    const int64_t elements[] = {call.rows() * s.value_dim, call.rows(), call.rows() * s.head_dim, keys * s.head_dim,
                                keys * s.value_dim};
    const int results = gradients ? Verdict::kResults : Verdict::kLse + 1;
    check(cudaMemsetAsync(verdict_, 0xff, sizeof(Verdict), stream_), "clearing the verdict");
    for (auto& run : results_) {
      for (int n = 0; n < results; ++n) {
        const int64_t bytes = elements[n] * (n == Verdict::kLse ? 4 : 2) + 2 * kBandBytes;
        check(cudaMemsetAsync(run[n], 0xff, bytes, stream_), "poisoning a result");
      }
    }
    if (call.one_by_one) wait("preparing");
    for (int n = 0; n < 2; ++n) {
      if (session_.bug == "hang") spin<<<1, 1, 0, stream_>>>(5'000'000'000);
      p.o.data = result(n, Verdict::kOut);
      p.lse = static_cast<float*>(result(n, Verdict::kLse));
      check(cudaMemsetAsync(scratch_, 0xff, forward.scratch_floats * sizeof(float), stream_), "poisoning scratch");
      check(jfa::forward(p, scratch_, forward.scratch_floats, "auto", stream_));
      wait_for_run(call, n, "forward");
    }
    if (session_.bug == "flip") check(cudaMemsetAsync(p.lse, 0x11, 4, stream_), "planting");
    p.o.data = result(0, Verdict::kOut);
    p.lse = static_cast<float*>(result(0, Verdict::kLse));
    for (int n = 0; gradients && n < 2; ++n) {
      g.dq.data = result(n, Verdict::kDq);
      g.dk.data = result(n, Verdict::kDk);
      g.dv.data = result(n, Verdict::kDv);
      check(cudaMemsetAsync(scratch_, 0xff, plan.scratch_floats * sizeof(float), stream_), "poisoning scratch");
      check(jfa::backward(p, g, scratch_, plan.scratch_floats, "auto", stream_));
      wait_for_run(call, n, "backward");
    }
    if (gradients && session_.bug == "flip_gradient") check(cudaMemsetAsync(g.dv.data, 0x11, 2, stream_), "planting");

    const bool is_half = call.type == jfa::ElementType::kHalf;
    for (int n = 0; n < results; ++n) {
      const auto which = static_cast<Verdict::Result>(n);
      if (n == Verdict::kLse) {
        compare<uint32_t>(which, elements[n], SameBits{});
      } else if (n != Verdict::kDq || call.gradients == Call::kDeterministic) {
        compare<uint16_t>(which, elements[n], SameBits{});
      } else if (is_half) {
        compare<uint16_t>(which, elements[n], SameSum<__half>{Rounding(call.type).unit});
      } else {
        compare<uint16_t>(which, elements[n], SameSum<__nv_bfloat16>{Rounding(call.type).unit});
      }
    }
    if (judged && is_half) judge_call<__half>(call, p, g, gradients);
    if (judged && !is_half) judge_call<__nv_bfloat16>(call, p, g, gradients);
    check(cudaMemcpyAsync(found_, verdict_, sizeof(Verdict), cudaMemcpyDeviceToHost, stream_), "reading the verdict");
    wait("comparing");
    return describe();
  }

  void* result(int run, Verdict::Result which) const { return results_[run][which] + kBandBytes; }

  void wait_for_run(const Call& call, int run, const std::string& pass) {
    if (call.one_by_one || run == 1) wait((call.one_by_one ? run == 0 ? "first " : "second " : "either ") + pass);
  }

  template <class Word, class Same>
  void compare(Verdict::Result which, int64_t elements, Same same) {
    compare_runs<Word, Same><<<512, kJudges, 0, stream_>>>(static_cast<const Word*>(result(0, which)),
                                                           static_cast<const Word*>(result(1, which)), elements,
                                                           kBandBytes / sizeof(Word), &verdict_->first[which], same);
    check(cudaGetLastError(), "comparing two runs");
  }

  // The first run's out and lse, from which both of its gradients come, and the second's gradients.
  template <class Element>
  void judge_call(const Call& call, const jfa::Problem& p, const jfa::Gradients& g, bool gradients) {
    const jfa::Shape& s = call.shape;
    const double scale = call.scale() * (session_.bug == "wrong_scale" ? 1.05 : 1.0);
    const auto rows = static_cast<unsigned>(call.rows());
    const Rounding rounding(call.type);
    check_rows<Element><<<rows, kJudges, s.k_len * sizeof(double), stream_>>>(p, scale, rounding, verdict_);
    check(cudaGetLastError(), "running the reference");
    if (!gradients) return;
    const double backward_scale = scale * (session_.bug == "wrong_gradient" ? 1.05 : 1.0);
    const auto keys = static_cast<unsigned>(int64_t(s.batch) * s.k_len * s.kv_heads);
    check_query_gradients<Element><<<rows, kJudges, 0, stream_>>>(p, g, backward_scale, rounding, verdict_);
    check_key_gradients<Element><<<keys, kJudges, 0, stream_>>>(p, g, backward_scale, rounding, verdict_);
    check(cudaGetLastError(), "running the reference's backward");
  }

  jfa::Problem problem(const Call& call, uint64_t seed, jfa::Gradients& g) {
    const jfa::Shape& s = call.shape;
    std::mt19937_64 random(~seed);
    const auto tensor = [](void* data, int64_t rows, int64_t heads, int64_t dim) {
      return jfa::Tensor{data, rows * heads * dim, heads * dim, dim};
    };
    const auto input = [&](int64_t rows, int64_t heads, int64_t dim) {
      const int64_t elements = s.batch * rows * heads * dim;
      const int64_t first = 8 * (random() % ((Session::kPool - elements) / 8 + 1));
      const int64_t half = call.type == jfa::ElementType::kHalf ? 0 : Session::kPool;
      return tensor(static_cast<uint16_t*>(session_.pool) + half + first, rows, heads, dim);
    };
    jfa::Problem p;
    p.shape = s;
    p.type = call.type;
    p.q = input(s.q_len, s.heads, s.head_dim);
    p.k = input(s.k_len, s.kv_heads, s.head_dim);
    p.v = input(s.k_len, s.kv_heads, s.value_dim);
    p.o = tensor(nullptr, s.q_len, s.heads, s.value_dim);
    g.d_o = input(s.q_len, s.heads, s.value_dim);
    g.dq = tensor(nullptr, s.q_len, s.heads, s.head_dim);
    g.dk = tensor(nullptr, s.k_len, s.kv_heads, s.head_dim);
    g.dv = tensor(nullptr, s.k_len, s.kv_heads, s.value_dim);
    g.deterministic = call.gradients == Call::kDeterministic;
    p.scores.scale = static_cast<float>(call.scale());
    if (call.general) p.scores.device_scale = scale_;
    p.visibility = call.window;
    // Packed sequences have bounds, others may have lengths.
    const bool packed = !call.cu_q.empty();
    const auto &of_rows = packed ? call.cu_q : call.q_lengths, &of_keys = packed ? call.cu_k : call.k_lengths;
    std::copy(of_rows.begin(), of_rows.end(), host_lengths_);
    std::copy(of_keys.begin(), of_keys.end(), host_lengths_ + kMostBounds);
    check(cudaMemcpyAsync(lengths_, host_lengths_, 2 * kMostBounds * sizeof(int), cudaMemcpyHostToDevice, stream_),
          "writing lengths or bounds");
    if (!of_rows.empty()) (packed ? p.visibility.cu_q : p.visibility.q_lengths) = lengths_;
    if (!of_keys.empty()) (packed ? p.visibility.cu_k : p.visibility.k_lengths) = lengths_ + kMostBounds;
    return p;
  }

  // Returns when the stream has done all, and ends the process where it does not in time.
  void wait(const std::string& what) {
    const auto start = Clock::now();
    for (;;) {
      const cudaError_t status = cudaStreamQuery(stream_);
      if (status == cudaSuccess) return;
      if (status != cudaErrorNotReady) throw std::runtime_error(what + ": " + cudaGetErrorName(status));
      const double waited = seconds_since(start);
      if (waited > session_.limit) {
        session_.give_up(what + ": no end after " + std::to_string(waited) + " s: " + text_);
      }
      if (waited > 1e-3) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }

  std::string describe() const {
    const auto in_runs = [](const char* name, unsigned long long first, int64_t band) {
      const int what = static_cast<int>(first >> 48);
      const std::string at = std::to_string(int64_t(first & 0xffffffffffffull) - band);
      return std::string(name) +
             (what == Verdict::kBand      ? " was written outside at element "
              : what == Verdict::kDiffers ? " of a second run differs at element "
                                          : " was not written at element ") +
             at;
    };
    for (int n = 0; n < Verdict::kResults; ++n) {
      const int64_t band = kBandBytes / (n == Verdict::kLse ? 4 : 2);
      if (found_->first[n] != ~0ull) return in_runs(kResultNames[n], found_->first[n], band);
    }
    if (found_->taken != 0) return "";
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.8g at batch %d, head %d, row %d, column %d, expected %.8g +- %.2g",
                  kResultNames[found_->result], found_->actual, found_->batch, found_->head, found_->row,
                  found_->column, found_->desired, found_->bound);
    return text;
  }

  Session& session_;
  std::mt19937_64 random_;
  std::string text_;
  cudaStream_t stream_ = nullptr;
  unsigned char* results_[2][Verdict::kResults];
  float *scratch_, *scale_;
  int *lengths_, *host_lengths_;
  Verdict *verdict_, *found_;
};

}  // namespace

int soak(double seconds, uint64_t seed, const std::string& bug, const jfa::Device& device) {
  Session session;
  session.device = device;
  session.seed = seed;
  session.bug = bug;
  if (bug == "hang") session.limit = 1.0;
  auto* pool = allocate<uint16_t>(2 * Session::kPool * sizeof(uint16_t));
  session.pool = pool;
  const auto noise = static_cast<uint32_t>(seed);
  fill_normal<<<1024, 256>>>(reinterpret_cast<__half*>(pool), Session::kPool, noise);
  fill_normal<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(pool + Session::kPool), Session::kPool, ~noise);
  check(cudaDeviceSynchronize(), "making the inputs");

  session.start = Clock::now();
  session.end = session.start + std::chrono::milliseconds(static_cast<int64_t>(1000 * seconds));
  std::atomic<int> running{2};
  std::vector<std::thread> threads;
  for (int n = 0; n < 2; ++n) {
    threads.emplace_back([&session, &running, n] {
      try {
        Worker(session, n).run();
      } catch (const std::exception& error) {
        session.give_up(error.what());
      }
      --running;
    });
  }
  const auto summary = [&] {
    const double passed = seconds_since(session.start);
    return std::to_string(session.calls) + " configurations in " + std::to_string(int(passed)) + " s, " +
           std::to_string(int(double(session.calls) / passed)) + " per second, " + std::to_string(session.judged) +
           " compared with the reference, " + std::to_string(session.failed) + " failed";
  };
  for (double next = 10.0; running > 0; std::this_thread::sleep_for(std::chrono::milliseconds(20))) {
    if (seconds_since(session.start) < next) continue;
    session.say(summary());
    next += 10.0;
  }
  for (std::thread& thread : threads) thread.join();
  session.say("soak, seed " + std::to_string(seed) + ": " + summary());
  return session.failed == 0 && session.judged > 0 ? 0 : 1;
}

}  // namespace sanitizer
