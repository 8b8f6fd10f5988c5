// Attention by its definition, on the host, and for every number how far a right kernel may be from it.
//
// The bound follows the roundings a kernel makes. It rounds P and dS to the 16-bit type before it multiplies them, each
// by up to u relatively, and its result once more; all else is f32, whose errors are taken as 2^-14 of the terms.
// So |error| <= sum |term| (u + 2^-14) + u |result|. The backward is defined from the out and lse that it is given.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"

namespace sanitizer {

constexpr double kFloatError = 1.0 / 16384;

// Of a 16-bit type: the largest relative error, and the error that remains where a number is subnormal.
struct Rounding {
  double unit, least;

  explicit Rounding(jfa::ElementType type)
      : unit(std::ldexp(1.0, type == jfa::ElementType::kHalf ? -11 : -8)),
        least(type == jfa::ElementType::kHalf ? std::ldexp(1.0, -25) : 0.0) {}
};

struct Expected {
  std::vector<double> value, bound;

  explicit Expected(size_t size = 0) : value(size), bound(size) {}
};

class Reference {
 public:
  Expected out, lse, dq, dk, dv, d_bias;

  // scale_error: 1, or something else to show that a wrong result is noticed.
  Reference(const Case& c, const Values& v, double scale_error = 1.0)
      : c_(c),
        s_(c.shape),
        v_(v),
        scale_error_(scale_error),
        unit_(Rounding(c.type).unit),
        least_(Rounding(c.type).least) {}

  void forward() {
    out = Expected(v_.d_o.size());
    lse = Expected(size_t(s_.batch) * s_.heads * s_.q_len);
    std::vector<double> score(s_.k_len), total(s_.value_dim), terms(s_.value_dim);
    each_row([&](int b, int h, int i) {
      double largest = -kInfinity, sum = 0.0;
      for (int j = 0; j < s_.k_len; ++j) largest = std::fmax(largest, score[j] = masked_score(b, h, i, j));
      if (largest != -kInfinity) {
        for (double& x : score) sum += x = std::exp(x - largest);
      }
      const double log_sum = sum > 0.0 ? largest + std::log(sum) : -kInfinity;
      set(lse, row(b, h, i), log_sum, sum > 0.0 ? kFloatError * (1.0 + std::fabs(log_sum)) : 0.0);
      std::fill(total.begin(), total.end(), 0.0), std::fill(terms.begin(), terms.end(), 0.0);
      for (int j = 0; sum > 0.0 && j < s_.k_len; ++j) {
        if (score[j] == 0.0) continue;
        const float* v = value(b, h, j);
        const double weight = score[j] / sum, error = weight * (unit_ + kFloatError) + least_ / sum;
        for (int d = 0; d < s_.value_dim; ++d) total[d] += weight * v[d], terms[d] += error * std::fabs(v[d]);
      }
      for (int d = 0; d < s_.value_dim; ++d) {
        set(out, query_at(b, h, i, s_.value_dim) + d, total[d], terms[d], true);
      }
    });
  }

  void backward(const std::vector<float>& given_out, const std::vector<float>& given_lse) {
    dq = Expected(v_.q.size()), dk = Expected(v_.k.size()), dv = Expected(v_.v.size());
    d_bias = Expected(v_.bias.size());
    each_row([&](int b, int h, int i) {
      const double log_sum = given_lse[row(b, h, i)], scale = scale_of(b);
      const float *q = &v_.q[query_at(b, h, i, s_.head_dim)], *d_o = &v_.d_o[query_at(b, h, i, s_.value_dim)];
      const float* o = &given_out[query_at(b, h, i, s_.value_dim)];
      double delta = v_.d_lse.empty() ? 0.0 : -v_.d_lse[row(b, h, i)], delta_terms = std::fabs(delta);
      for (int d = 0; d < s_.value_dim; ++d) delta += double(d_o[d]) * o[d], delta_terms += std::fabs(d_o[d] * o[d]);
      for (int j = 0; j < s_.k_len; ++j) {
        const double score = masked_score(b, h, i, j);
        if (score == -kInfinity) continue;
        const double p = std::exp(score - log_sum);
        const float *k = key(b, h, j), *v = value(b, h, j);
        double dp = 0.0, dp_terms = delta_terms;
        for (int d = 0; d < s_.value_dim; ++d) dp += double(d_o[d]) * v[d], dp_terms += std::fabs(d_o[d] * v[d]);
        const double ds = p * (dp - delta), ds_float = kFloatError * (std::fabs(ds) + p * dp_terms);
        const double p_error = p * (unit_ + kFloatError) + least_, ds_error = ds_float + unit_ * std::fabs(ds) + least_;
        for (int d = 0; d < s_.value_dim; ++d) add(dv, key_at(b, h, j, s_.value_dim) + d, p * d_o[d], p_error * d_o[d]);
        for (int d = 0; d < s_.head_dim; ++d) {
          add(dq, query_at(b, h, i, s_.head_dim) + d, scale * ds * k[d], scale * ds_error * k[d]);
          add(dk, key_at(b, h, j, s_.head_dim) + d, scale * ds * q[d], scale * ds_error * q[d]);
        }
        if (!v_.bias.empty()) add(d_bias, score_at(c_.bias, b, h, i, j), ds, ds_float);  // never rounded to 16 bits
      }
    });
    for (Expected* x : {&dq, &dk, &dv}) {
      for (size_t n = 0; n < x->value.size(); ++n) x->bound[n] += rounding(x->value[n]);
    }
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  template <class F>
  void each_row(F&& f) const {
    for (int b = 0; b < s_.batch; ++b) {
      for (int h = 0; h < s_.heads; ++h) {
        for (int i = 0; i < s_.q_len; ++i) f(b, h, i);
      }
    }
  }

  double rounding(double x) const { return unit_ * std::fabs(x) + least_; }
  void set(Expected& x, size_t at, double value, double bound, bool rounded = false) const {
    x.value[at] = value;
    x.bound[at] = bound + (rounded ? rounding(value) : 0.0);
  }
  static void add(Expected& x, size_t at, double value, double error) {
    x.value[at] += value;
    x.bound[at] += std::fabs(error);
  }

  double scale_of(int b) const {
    const std::vector<float>& on_device = c_.device_scale;
    return scale_error_ * (on_device.empty() ? c_.scale() : on_device[on_device.size() > 1 ? b : 0]);
  }

  bool visible(int b, int h, int i, int j) const {
    const int64_t q_len = c_.q_lengths.empty() ? s_.q_len : c_.q_lengths[b];
    const int64_t k_len = c_.k_lengths.empty() ? s_.k_len : c_.k_lengths[b];
    int64_t diagonal = i + (c_.window.bottom_right ? k_len - q_len : 0);
    if (!c_.cu_q.empty()) {
      const int sequences = static_cast<int>(c_.cu_q.size()) / s_.batch - 1;
      const int *q = &c_.cu_q[size_t(b) * (sequences + 1)], *k = &c_.cu_k[size_t(b) * (sequences + 1)];
      int n = 0;
      while (n < sequences && !(q[n] <= i && i < q[n + 1] && k[n] <= j && j < k[n + 1])) ++n;
      if (n == sequences) return false;
      const int end = n + c_.window.bottom_right;  // where both are aligned
      diagonal = i - q[end] + k[end];
    }
    bool near =
        (j >= diagonal - c_.window.window_left || j < c_.window.sink_tokens) && j <= diagonal + c_.window.window_right;
    const size_t spans = c_.spans.size() / s_.batch;
    for (size_t n = b * spans; n < (b + 1) * spans; n += 2) {
      const int begin = c_.spans[n], end = c_.spans[n + 1];
      near |= begin <= diagonal && diagonal < end && begin <= j && j < end;
    }
    if (!c_.q_segments.empty()) {
      near &= c_.q_segments[size_t(b) * s_.q_len + i] == c_.k_segments[size_t(b) * s_.k_len + j];
    }
    return near && i < q_len && j < k_len && (v_.mask.empty() || v_.mask[score_at(c_.mask, b, h, i, j)] != 0.0f);
  }

  double masked_score(int b, int h, int i, int j) const {
    if (!visible(b, h, i, j)) return -kInfinity;
    const float *q = &v_.q[query_at(b, h, i, s_.head_dim)], *k = key(b, h, j);
    double product = 0.0;
    for (int d = 0; d < s_.head_dim; ++d) product += double(q[d]) * k[d];
    return scale_of(b) * product + (v_.bias.empty() ? 0.0 : v_.bias[score_at(c_.bias, b, h, i, j)]);
  }

  size_t row(int b, int h, int i) const { return (size_t(b) * s_.heads + h) * s_.q_len + i; }
  size_t query_at(int b, int h, int i, int dim) const { return ((size_t(b) * s_.q_len + i) * s_.heads + h) * dim; }
  size_t key_at(int b, int h, int j, int dim) const {
    return ((size_t(b) * s_.k_len + j) * s_.kv_heads + h / (s_.heads / s_.kv_heads)) * dim;
  }
  const float* key(int b, int h, int j) const { return &v_.k[key_at(b, h, j, s_.head_dim)]; }
  const float* value(int b, int h, int j) const { return &v_.v[key_at(b, h, j, s_.value_dim)]; }
  static size_t score_at(const Extents& e, int b, int h, int i, int j) {
    const auto along = [](int extent, int index) { return extent == 1 ? 0 : index; };
    return ((size_t(along(e[0], b)) * e[1] + along(e[1], h)) * e[2] + along(e[2], i)) * e[3] + along(e[3], j);
  }

  const Case& c_;
  const jfa::Shape& s_;
  const Values& v_;
  double scale_error_, unit_, least_;
};

// Throws where a number is NaN, is infinite and should not be, or is too far off.
inline void compare(const std::string& name, const std::vector<float>& actual, const Expected& expected) {
  for (size_t n = 0; n < actual.size(); ++n) {
    const double x = actual[n], desired = expected.value[n];
    const bool right = std::isinf(desired) ? x == desired : std::fabs(x - desired) <= expected.bound[n];
    if (right) continue;
    char text[200];
    std::snprintf(text, sizeof text, " is %.8g at element %zu of %zu, expected %.8g +- %.2g", x, n, actual.size(),
                  desired, expected.bound[n]);
    throw std::runtime_error(name + text);
  }
}

}  // namespace sanitizer
