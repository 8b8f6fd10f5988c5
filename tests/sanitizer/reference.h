// Attention by its definition, on the host, and for every number how far a right kernel may be from it.
//
// The bound follows the roundings a kernel makes. It rounds P and dS to the 16-bit type before it multiplies them, each
// by up to u relatively, and its result once more; all else is f32, whose errors are taken as 2^-14 of the terms.
// So |error| <= sum |term| (u + 2^-14) + u |result|. A soft cap's tanh is off by 2^-11, and so are its scores, relative
// to the cap, which is an absolute error of an exponent. The backward is defined from the out and lse that it is given.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
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
      for (double& x : score) sum += x = largest == -kInfinity ? 0.0 : std::exp(x - largest);
      if (const double sink = sink_of(b, h, i); sink != -kInfinity) {  // no case has one that exp() is too small for
        if (largest == -kInfinity) largest = sink;
        sum += std::exp(sink - largest);
      }
      const double log_sum = sum > 0.0 ? largest + std::log(sum) : -kInfinity;
      set(lse, row(b, h, i), log_sum, sum > 0.0 ? kFloatError * (1.0 + std::fabs(log_sum)) + cap_error() : 0.0);
      std::fill(total.begin(), total.end(), 0.0), std::fill(terms.begin(), terms.end(), 0.0);
      for (int j = 0; sum > 0.0 && j < s_.k_len; ++j) {
        if (score[j] == 0.0) continue;
        const float* v = value(b, h, j);
        const double weight = score[j] / sum * kept(b, h, i, j);
        const double error = weight * (unit_ + kFloatError + 2.0 * cap_error()) + least_ / sum * kept(b, h, i, j);
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
        const double keep = kept(b, h, i, j), p_kept = keep * p, ds = p * (keep * dp - delta);
        const double ds_float =
            kFloatError * (std::fabs(ds) + p * std::fmax(keep, 1.0) * dp_terms) + cap_error() * std::fabs(ds);
        const double p_error = p_kept * (unit_ + kFloatError + cap_error()) + least_ * std::fmax(keep, 1.0);
        // What is before the cap: the derivative is rounded to half precision, and made from a tanh that is off.
        const double slope = slope_of(b, h, i, j), dt = ds * slope;
        const double dt_error = ds_float * slope + unit_ * std::fabs(dt) + least_ +
                                (c_.soft_cap > 0.0f ? 3.0 * kTanhError * std::fabs(ds) : 0.0);
        for (int d = 0; d < s_.value_dim; ++d)
          add(dv, key_at(b, h, j, s_.value_dim) + d, p_kept * d_o[d], p_error * d_o[d]);
        for (int d = 0; d < s_.head_dim; ++d) {
          add(dq, query_at(b, h, i, s_.head_dim) + d, scale * dt * k[d], scale * dt_error * k[d]);
          add(dk, key_at(b, h, j, s_.head_dim) + d, scale * dt * q[d], scale * dt_error * q[d]);
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
    const std::optional<int64_t> offset = offset_of(b, i, j);
    if (!offset) return false;
    const int64_t diagonal = i + *offset;
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

  // Row i lies at position i + offset among the keys; nothing where it and key j are not of one packed sequence.
  std::optional<int64_t> offset_of(int b, int i, int j) const {
    if (c_.cu_q.empty()) {
      const int64_t q_len = c_.q_lengths.empty() ? s_.q_len : c_.q_lengths[b];
      const int64_t k_len = c_.k_lengths.empty() ? s_.k_len : c_.k_lengths[b];
      return c_.window.bottom_right ? k_len - q_len : 0;
    }
    const int sequences = static_cast<int>(c_.cu_q.size()) / s_.batch - 1;
    const int *q = &c_.cu_q[size_t(b) * (sequences + 1)], *k = &c_.cu_k[size_t(b) * (sequences + 1)];
    for (int n = 0; n < sequences; ++n) {
      if (!(q[n] <= i && i < q[n + 1] && k[n] <= j && j < k[n + 1])) continue;
      const int end = n + c_.window.bottom_right;  // where both are aligned
      return k[end] - q[end];
    }
    return std::nullopt;
  }
  int64_t distance(int b, int i, int j) const { return int64_t(j) - i - offset_of(b, i, j).value_or(0); }
  float of_head(const std::vector<float>& values, int b, int h) const {
    return values[int(values.size()) > s_.heads ? b * s_.heads + h : h];
  }
  double sink_of(int b, int h, int i) const {
    const bool real = c_.q_lengths.empty() || i < c_.q_lengths[b];
    return c_.sinks.empty() || !real ? -kInfinity : of_head(c_.sinks, b, h);
  }

  // What dropout multiplies a probability by: jax_flashattn/_dropout.py.
  double kept(int b, int h, int i, int j) const {
    if (c_.dropout_steps == 0) return 1.0;
    const uint32_t* seeds = &v_.seeds[(size_t(b) * s_.heads + h) * 2];
    uint32_t x = i / 16 * 8 + i % 8, y = (j / 32 * 8 + j % 8) ^ seeds[1];
    for (uint32_t round = 0; round < 7; ++round) {
      const uint64_t product = uint64_t(0xD256D193) * x;
      x = uint32_t(product >> 32) ^ (seeds[0] + round * 0x9E3779B9) ^ y;
      y = uint32_t(product);
    }
    const uint32_t own = (j % 32 < 16 ? x : y) >> (i / 8 % 2 * 8 + j / 8 % 2 * 16) & 0xff;
    const uint32_t bits = own << 8 | (x * 0x9E3779B9 + y) >> 24;
    return bits < c_.dropout_steps ? 0.0 : 65536.0 / (65536.0 - c_.dropout_steps);
  }

  static constexpr double kTanhError = 1.0 / 2048;
  double cap_error() const { return c_.soft_cap * kTanhError; }
  double slope_of(int b, int h, int i, int j) const {
    const double t = c_.soft_cap > 0.0f ? std::tanh(product(b, h, i, j) / c_.soft_cap) : 0.0;
    return 1.0 - t * t;
  }

  double masked_score(int b, int h, int i, int j) const {
    if (!visible(b, h, i, j)) return -kInfinity;
    double score = product(b, h, i, j);
    if (c_.soft_cap > 0.0f) score = c_.soft_cap * std::tanh(score / c_.soft_cap);
    if (!v_.bias.empty()) score += v_.bias[score_at(c_.bias, b, h, i, j)];
    if (!c_.alibi_slopes.empty()) score -= of_head(c_.alibi_slopes, b, h) * double(std::llabs(distance(b, i, j)));
    return score;
  }
  // Times the scale.
  double product(int b, int h, int i, int j) const {
    const float *q = &v_.q[query_at(b, h, i, s_.head_dim)], *k = key(b, h, j);
    double sum = 0.0;
    for (int d = 0; d < s_.head_dim; ++d) sum += double(q[d]) * k[d];
    return scale_of(b) * sum;
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
