// The judges of soak.cu for gradients: Reference::backward() of reference.h, without bias, mask and d_lse.
#pragma once

#include "soak.cuh"

namespace sanitizer {

// The sum of products of two rows, and that of their sizes; 16 bytes at a time.
template <class Element>
__device__ double2 product(const Element* x, const Element* y, int dim) {
  double2 sum = {0.0, 0.0};
  for (int chunk = 0; chunk < dim / 8; ++chunk) {
    const uint4 loaded[] = {reinterpret_cast<const uint4*>(x)[chunk], reinterpret_cast<const uint4*>(y)[chunk]};
    const auto* a = reinterpret_cast<const Element*>(&loaded[0]);
    const auto* b = reinterpret_cast<const Element*>(&loaded[1]);
    for (int d = 0; d < 8; ++d) {
      const double term = double(to_float(a[d])) * to_float(b[d]);
      sum.x += term;
      sum.y += fabs(term);
    }
  }
  return sum;
}

// What query i of head h and key j have to do with each other; zeros where it does not see the key.
struct Pair {
  double p, p_error, ds, ds_error;
};

template <class Element>
__device__ Pair pair_of(const jfa::Problem& p, const jfa::Gradients& g, double scale, const Rounding& rounding, int b,
                        int h, int i, int j) {
  const auto [begin, end] = visible_keys(p, b, i);
  if (j < begin || j >= end) return {};
  const jfa::Shape& s = p.shape;
  const int kv_head = h / (s.heads / s.kv_heads);
  const Element* d_o = row_of<Element>(g.d_o, b, i, h);
  const double2 delta = product(d_o, row_of<Element>(p.o, b, i, h), s.value_dim);
  const double2 dp = product(d_o, row_of<Element>(p.v, b, j, kv_head), s.value_dim);
  const double score =
      scale * product(row_of<Element>(p.q, b, i, h), row_of<Element>(p.k, b, j, kv_head), s.head_dim).x;
  Pair pair;
  pair.p = exp(score - p.lse[(int64_t(b) * s.heads + h) * s.q_len + i]);
  pair.p_error = pair.p * (rounding.unit + kFloatError) + rounding.least;
  pair.ds = pair.p * (dp.x - delta.x);
  pair.ds_error =
      kFloatError * (fabs(pair.ds) + pair.p * (dp.y + delta.y)) + rounding.unit * fabs(pair.ds) + rounding.least;
  return pair;
}

// A sum, with the error that a right kernel may make in it.
struct Sum {
  double value = 0.0, error = 0.0;

  __device__ void add(double factor, double factor_error, double x) {
    value += factor * x;
    error += factor_error * fabs(x);
  }
  __device__ void judge_against(Verdict* verdict, Verdict::Result result, double actual, double scale,
                                const Rounding& rounding, int b, int h, int row, int column) const {
    const double desired = scale * value;
    judge(verdict, result, actual, desired, fabs(scale) * error + rounding.unit * fabs(desired) + rounding.least, b, h,
          row, column);
  }
};

// dQ: one block per row, one thread per column.
template <class Element>
__global__ void check_query_gradients(const jfa::Problem p, const jfa::Gradients g, double scale, Rounding rounding,
                                      Verdict* verdict) {
  __shared__ Pair pairs[kJudges];
  const jfa::Shape& s = p.shape;
  const int t = threadIdx.x;
  const int i = blockIdx.x % s.q_len, h = blockIdx.x / s.q_len % s.heads, b = blockIdx.x / s.q_len / s.heads;
  const auto [begin, end] = visible_keys(p, b, i);
  Sum dq;
  for (int first = begin; first < end; first += kJudges) {
    __syncthreads();
    pairs[t] = pair_of<Element>(p, g, scale, rounding, b, h, i, first + t);
    __syncthreads();
    for (int n = 0; t < s.head_dim && n < kJudges && first + n < end; ++n) {
      const double k = to_float(row_of<Element>(p.k, b, first + n, h / (s.heads / s.kv_heads))[t]);
      dq.add(pairs[n].ds, pairs[n].ds_error, k);
    }
  }
  if (t >= s.head_dim) return;
  dq.judge_against(verdict, Verdict::kDq, to_float(row_of<Element>(g.dq, b, i, h)[t]), scale, rounding, b, h, i, t);
}

// dK and dV: one block per key, one thread per column.
template <class Element>
__global__ void check_key_gradients(const jfa::Problem p, const jfa::Gradients g, double scale, Rounding rounding,
                                    Verdict* verdict) {
  __shared__ Pair pairs[kJudges];
  const jfa::Shape& s = p.shape;
  const int t = threadIdx.x, group = s.heads / s.kv_heads;
  const int j = blockIdx.x % s.k_len, kv_head = blockIdx.x / s.k_len % s.kv_heads,
            b = blockIdx.x / s.k_len / s.kv_heads;
  Sum dk, dv;
  for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (int first = 0; first < s.q_len; first += kJudges) {
      __syncthreads();
      pairs[t] = first + t < s.q_len ? pair_of<Element>(p, g, scale, rounding, b, h, first + t, j) : Pair{};
      __syncthreads();
      for (int n = 0; n < kJudges && first + n < s.q_len; ++n) {
        const Pair& pair = pairs[n];
        if (pair.p == 0.0) continue;
        if (t < s.head_dim) dk.add(pair.ds, pair.ds_error, to_float(row_of<Element>(p.q, b, first + n, h)[t]));
        if (t < s.value_dim) dv.add(pair.p, pair.p_error, to_float(row_of<Element>(g.d_o, b, first + n, h)[t]));
      }
    }
  }
  const auto check = [&](const Sum& sum, Verdict::Result result, const jfa::Tensor& tensor, double factor) {
    sum.judge_against(verdict, result, to_float(row_of<Element>(tensor, b, j, kv_head)[t]), factor, rounding, b,
                      kv_head, j, t);
  };
  if (t < s.head_dim) check(dk, Verdict::kDk, g.dk, scale);
  if (t < s.value_dim) check(dv, Verdict::kDv, g.dv, 1.0);
}

}  // namespace sanitizer
