// Random forward calls, family auto, from two threads on a stream each. Each call runs twice, into outputs of ones, and
// the two must agree in every bit; every 20th is compared with attention by its definition. A call that does not end is
// named, and ends the process.
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

namespace sanitizer {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kOperandElements = 1 << 25;
constexpr int64_t kRows = kOperandElements / 8;
constexpr int64_t kProducts = int64_t(1) << 35;  // at most: the slowest judge then takes some tenths of a second
constexpr int kMostBatch = 8, kLongest = 3000;
constexpr int kReferenceEvery = 20;
constexpr size_t kBandBytes = 4096 + 16;
constexpr double kScaleOnDevice = 0.1f;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// One call. It is what its seed makes of it.
struct Call {
  jfa::Shape shape;
  jfa::ElementType type = jfa::ElementType::kBfloat16;
  jfa::Visibility window;
  std::vector<int> q_lengths, k_lengths;
  bool general = false;     // the scale is on the device
  bool one_by_one = false;  // the first run has ended before the second begins

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
    if (chance(0.25)) q_lengths = lengths(shape.q_len);
    if (chance(0.25)) k_lengths = lengths(shape.k_len);
    general = chance(0.15);
    one_by_one = chance(0.5);
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
  bool too_large() const {
    const int64_t dim = std::max(shape.head_dim, shape.value_dim);
    return rows() * dim > kOperandElements ||
           int64_t(shape.batch) * shape.k_len * shape.kv_heads * dim > kOperandElements ||
           rows() * shape.k_len * (shape.head_dim + shape.value_dim) > kProducts;
  }

  std::mt19937_64 random_;
};

// What the threads share.
struct Session {
  uint64_t seed;
  std::string bug;
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
    for (int n = 0; n < 2; ++n) {
      out_[n] = allocate<unsigned char>(2 * kOperandElements + 2 * kBandBytes);
      lse_[n] = allocate<unsigned char>(4 * kRows + 2 * kBandBytes);
    }
    scratch_ = allocate<float>(kScratchFloats * sizeof(float));
    lengths_ = allocate<int>(2 * kMostBatch * sizeof(int));
    scale_ = allocate<float>(sizeof(float));
    verdict_ = allocate<Verdict>(sizeof(Verdict));
    found_ = allocate<Verdict>(sizeof(Verdict), true);
    host_lengths_ = allocate<int>(2 * kMostBatch * sizeof(int), true);
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
  static constexpr int64_t kScratchFloats = 64;

  // Says what is wrong, if anything is.
  std::string run(const Call& call, bool judged, uint64_t seed) {
    const jfa::Shape& s = call.shape;
    const int64_t out_elements = call.rows() * s.value_dim;
    jfa::Problem p = problem(call, seed);
    check(cudaMemsetAsync(verdict_, 0xff, sizeof(Verdict), stream_), "clearing the verdict");
    check(cudaMemsetAsync(scratch_, 0xff, kScratchFloats * sizeof(float), stream_), "poisoning scratch");
    for (int n = 0; n < 2; ++n) {
      check(cudaMemsetAsync(out_[n], 0xff, 2 * out_elements + 2 * kBandBytes, stream_), "poisoning out");
      check(cudaMemsetAsync(lse_[n], 0xff, 4 * call.rows() + 2 * kBandBytes, stream_), "poisoning lse");
    }
    if (call.one_by_one) wait("preparing");
    for (int n = 0; n < 2; ++n) {
      if (session_.bug == "hang") spin<<<1, 1, 0, stream_>>>(5'000'000'000);
      p.o.data = out_[n] + kBandBytes;
      p.lse = reinterpret_cast<float*>(lse_[n] + kBandBytes);
      check(jfa::forward(p, scratch_, kScratchFloats, "auto", stream_));
      if (call.one_by_one || n == 1) wait(n == 0 ? "first run" : call.one_by_one ? "second run" : "both runs");
    }
    if (session_.bug == "flip") check(cudaMemsetAsync(p.lse, 0x11, 4, stream_), "planting");

    constexpr int kBlocks = 512;
    const auto* lse = reinterpret_cast<const uint32_t*>(lse_[0] + kBandBytes);
    const auto* out = reinterpret_cast<const uint16_t*>(out_[0] + kBandBytes);
    compare_runs<uint16_t><<<kBlocks, kJudges, 0, stream_>>>(out, static_cast<const uint16_t*>(p.o.data), out_elements,
                                                             kBandBytes / 2, &verdict_->out);
    check(cudaGetLastError(), "comparing out");
    compare_runs<uint32_t><<<kBlocks, kJudges, 0, stream_>>>(lse, reinterpret_cast<const uint32_t*>(p.lse), call.rows(),
                                                             kBandBytes / 4, &verdict_->lse);
    check(cudaGetLastError(), "comparing lse");
    if (judged) {
      const double scale = call.scale() * (session_.bug == "wrong_scale" ? 1.05 : 1.0);
      const auto rows = static_cast<unsigned>(call.rows());
      const size_t shared = s.k_len * sizeof(double);
      const Rounding rounding(call.type);
      if (call.type == jfa::ElementType::kHalf) {
        check_rows<__half><<<rows, kJudges, shared, stream_>>>(p, scale, rounding, verdict_);
      } else {
        check_rows<__nv_bfloat16><<<rows, kJudges, shared, stream_>>>(p, scale, rounding, verdict_);
      }
      check(cudaGetLastError(), "running the reference");
    }
    check(cudaMemcpyAsync(found_, verdict_, sizeof(Verdict), cudaMemcpyDeviceToHost, stream_), "reading the verdict");
    wait("comparing");
    return describe();
  }

  jfa::Problem problem(const Call& call, uint64_t seed) {
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
    p.scores.scale = static_cast<float>(call.scale());
    if (call.general) p.scores.device_scale = scale_;
    p.visibility = call.window;
    std::copy(call.q_lengths.begin(), call.q_lengths.end(), host_lengths_);
    std::copy(call.k_lengths.begin(), call.k_lengths.end(), host_lengths_ + kMostBatch);
    check(cudaMemcpyAsync(lengths_, host_lengths_, 2 * kMostBatch * sizeof(int), cudaMemcpyHostToDevice, stream_),
          "writing the lengths");
    if (!call.q_lengths.empty()) p.visibility.q_lengths = lengths_;
    if (!call.k_lengths.empty()) p.visibility.k_lengths = lengths_ + kMostBatch;
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
    if (found_->out != ~0ull) return in_runs("out", found_->out, kBandBytes / 2);
    if (found_->lse != ~0ull) return in_runs("lse", found_->lse, kBandBytes / 4);
    if (found_->taken != 0) return "";
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.8g at batch %d, head %d, row %d, column %d, expected %.8g +- %.2g",
                  found_->column < 0 ? "lse" : "out", found_->actual, found_->batch, found_->head, found_->row,
                  found_->column, found_->desired, found_->bound);
    return text;
  }

  Session& session_;
  std::mt19937_64 random_;
  std::string text_;
  cudaStream_t stream_ = nullptr;
  unsigned char *out_[2], *lse_[2];
  float *scratch_, *scale_;
  int *lengths_, *host_lengths_;
  Verdict *verdict_, *found_;
};

}  // namespace

int soak(double seconds, uint64_t seed, const std::string& bug) {
  Session session;
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
