// The device side of soak.cu: inputs, and the judges of outputs that stay on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "problem.h"
#include "reference.h"

namespace sanitizer {

constexpr int kJudges = 256;  // threads of a block

// What was found wrong; all ones, as cudaMemset leaves it: nothing.
struct Verdict {
  enum What { kBand = 1, kDiffers, kUnwritten };
  enum Result { kOut, kLse, kDq, kDk, kDv, kResults };
  unsigned long long first[kResults];  // wrong element: what is wrong << 48, and its index, counted from the band on
  unsigned taken;                      // 0: the rest is about the first wrong number that a thread came to
  int result, batch, head, row, column;
  double actual, desired, bound;
};
constexpr const char* kResultNames[] = {"out", "lse", "dq", "dk", "dv"};

__device__ inline uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// N(0, 1)
template <class Element>
__global__ void fill_normal(Element* to, int64_t elements, uint32_t seed) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < elements; n += stride) {
    const uint32_t a = mixed(static_cast<uint32_t>(n) + seed), b = mixed(a ^ 0x9e3779b9u);
    const float u = (float(a >> 8) + 0.5f) / 16777216.0f, angle = float(b >> 8) / 16777216.0f;
    from_float(to[n], sqrtf(-2.0f * logf(u)) * cospif(2.0f * angle));
  }
}

// How two runs agree: in every bit, or as sums of the same terms in another order.
struct SameBits {
  template <class Word>
  __device__ bool operator()(Word a, Word b) const {
    return a == b;
  }
};
template <class Element>
struct SameSum {
  double unit;

  // One place of the 16-bit type, and what f32 loses of terms that may cancel.
  __device__ bool operator()(uint16_t a, uint16_t b) const {
    const float x = to_float(reinterpret_cast<const Element&>(a)), y = to_float(reinterpret_cast<const Element&>(b));
    return fabs(x - y) <= 2.0 * unit * fmax(fabs(x), fabs(y)) + 1e-4;
  }
};

// Two runs of one call, each between bands of `band` elements: equal, all written, nothing beyond.
template <class Word, class Same = SameBits>
__global__ void compare_runs(const Word* a, const Word* b, int64_t elements, int64_t band, unsigned long long* first,
                             Same same = {}) {
  const Word poison = static_cast<Word>(~0u);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x - band; n < elements + band; n += stride) {
    const bool inside = n >= 0 && n < elements;
    unsigned long long what = 0;
    if (!inside) {
      if (a[n] != poison || b[n] != poison) what = Verdict::kBand;
    } else if (a[n] == poison || b[n] == poison) {
      what = Verdict::kUnwritten;
    } else if (!same(a[n], b[n])) {
      what = Verdict::kDiffers;
    }
    if (what != 0) atomicMin(first, what << 48 | static_cast<unsigned long long>(n + band));
  }
}

template <class Reduce>
__device__ double over_block(double value, double (&partial)[kJudges], Reduce reduce) {
  __syncthreads();
  partial[threadIdx.x] = value;
  for (int half = kJudges / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] = reduce(partial[threadIdx.x], partial[threadIdx.x + half]);
  }
  __syncthreads();
  return partial[0];
}

__device__ inline void judge(Verdict* verdict, Verdict::Result result, double actual, double desired, double bound,
                             int b, int h, int i, int d) {
  if (isinf(desired) ? actual == desired : fabs(actual - desired) <= bound) return;
  if (atomicCAS(&verdict->taken, ~0u, 0u) != ~0u) return;
  verdict->result = result;
  verdict->batch = b, verdict->head = h, verdict->row = i, verdict->column = d;
  verdict->actual = actual, verdict->desired = desired, verdict->bound = bound;
}

struct Keys {
  int begin, end;
};

// Those that row i sees.
__device__ inline Keys visible_keys(const jfa::Problem& p, int b, int i) {
  if (p.visibility.cu_q != nullptr) {
    const int sequences = p.visibility.sequences, bottom_right = p.visibility.bottom_right;
    const int *q = p.visibility.cu_q + b * (sequences + 1), *k = p.visibility.cu_k + b * (sequences + 1);
    for (int n = 0; n < sequences; ++n) {
      if (i < q[n] || i >= q[n + 1]) continue;
      const int64_t diagonal = i + k[n + bottom_right] - q[n + bottom_right];
      const int64_t first = diagonal - p.visibility.window_left, past = diagonal + p.visibility.window_right + 1;
      return {static_cast<int>(first > k[n] ? first : k[n]), static_cast<int>(past < k[n + 1] ? past : k[n + 1])};
    }
    return {0, 0};
  }
  const int64_t q_len = p.visibility.q_lengths ? p.visibility.q_lengths[b] : p.shape.q_len;
  const int64_t k_len = p.visibility.k_lengths ? p.visibility.k_lengths[b] : p.shape.k_len;
  const int64_t diagonal = i + (p.visibility.bottom_right ? k_len - q_len : 0);
  const int64_t first = diagonal - p.visibility.window_left, last = diagonal + p.visibility.window_right;
  return {first > 0 ? static_cast<int>(first < k_len ? first : k_len) : 0,
          i >= q_len ? 0 : static_cast<int>(last + 1 < k_len ? last + 1 : k_len)};
}

template <class Element>
__device__ const Element* row_of(const jfa::Tensor& tensor, int b, int row, int head) {
  return static_cast<const Element*>(tensor.data) + b * tensor.batch_stride + row * tensor.row_stride +
         head * tensor.head_stride;
}

// Reference::forward() of reference.h, without bias and mask: one block per row, and dynamic shared memory for k_len
// numbers. Rows of q and k are read 16 bytes at a time.
template <class Element>
__global__ void check_rows(const jfa::Problem p, double scale, Rounding rounding, Verdict* verdict) {
  extern __shared__ double weight[];
  __shared__ double query[256], partial[kJudges];
  const jfa::Shape& s = p.shape;
  const int t = threadIdx.x;
  const int i = blockIdx.x % s.q_len, h = blockIdx.x / s.q_len % s.heads, b = blockIdx.x / s.q_len / s.heads;
  const auto [begin, end] = visible_keys(p, b, i);
  const int kv_head = h / (s.heads / s.kv_heads);
  if (t < s.head_dim) query[t] = to_float(row_of<Element>(p.q, b, i, h)[t]);
  __syncthreads();

  double largest = -INFINITY, sum = 0.0;
  for (int j = begin + t; j < end; j += kJudges) {
    const auto* chunks = reinterpret_cast<const uint4*>(row_of<Element>(p.k, b, j, kv_head));
    double product = 0.0;
    for (int chunk = 0; chunk < s.head_dim / 8; ++chunk) {
      const uint4 loaded = chunks[chunk];
      const auto* keys = reinterpret_cast<const Element*>(&loaded);
      for (int d = 0; d < 8; ++d) product += query[8 * chunk + d] * to_float(keys[d]);
    }
    weight[j - begin] = scale * product;
    largest = fmax(largest, scale * product);
  }
  largest = over_block(largest, partial, [](double x, double y) { return fmax(x, y); });
  for (int j = begin + t; j < end; j += kJudges) sum += weight[j - begin] = exp(weight[j - begin] - largest);
  sum = over_block(sum, partial, [](double x, double y) { return x + y; });

  if (t == 0) {
    const double log_sum = sum > 0.0 ? largest + log(sum) : -INFINITY;
    judge(verdict, Verdict::kLse, p.lse[(int64_t(b) * s.heads + h) * s.q_len + i], log_sum,
          sum > 0.0 ? kFloatError * (1.0 + fabs(log_sum)) : 0.0, b, h, i, 0);
  }
  if (t >= s.value_dim) return;
  double total = 0.0, terms = 0.0, all = 0.0;
  for (int j = begin; j < end; ++j) {
    const double v = to_float(row_of<Element>(p.v, b, j, kv_head)[t]);
    total += weight[j - begin] * v;
    terms += weight[j - begin] * fabs(v);
    all += fabs(v);
  }
  const double desired = sum > 0.0 ? total / sum : 0.0;
  const double error = sum > 0.0 ? (terms * (rounding.unit + kFloatError) + all * rounding.least) / sum : 0.0;
  judge(verdict, Verdict::kOut, to_float(row_of<Element>(p.o, b, i, h)[t]), desired,
        error + rounding.unit * fabs(desired) + rounding.least, b, h, i, t);
}

// Does not end within `cycles`.
__global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

}  // namespace sanitizer
