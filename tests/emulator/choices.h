// Which tiles of the Hopper family a library holds: all, or, if it is a mutant's, those that its call comes to.
#pragma once

#include <cxxabi.h>

#include <cstdlib>
#include <string>
#include <type_traits>
#include <typeinfo>

// Launchers ask functions of these names, below, for their tile.
#define with_forward_tile choose_forward_tile
#define with_backward_tile choose_backward_tile
#define with_backward_wide_tile choose_backward_wide_tile
#define with_backward_query_tile choose_backward_query_tile
#define with_backward_bias_tile choose_backward_bias_tile
#include "sm90/family.h"
#undef with_forward_tile
#undef with_backward_tile
#undef with_backward_wide_tile
#undef with_backward_query_tile
#undef with_backward_bias_tile

namespace jfa {

// What the Hopper family's functions with_..._tile() call theirs with: the types of a tile and, unless the kernel is
// that for the gradient of a bias, of whether scores are general.
template <class... Types>
struct Choice {};

template <class Choice, class... Held>
constexpr bool kIsOneOf = (std::is_same_v<Choice, Held> || ...);

// Whether this library holds the kernel: all, or if it is a mutant's those of JFA_CHOICES.
#ifdef JFA_CHOICES
template <class Choice>
constexpr bool kHolds = kIsOneOf<Choice, JFA_CHOICES>;
#else
template <class Choice>
constexpr bool kHolds = true;
#endif

// Calls f, with what such a function calls it with, if this library holds the kernel.
template <class F>
auto if_held(F& f) {
  return [&f](auto... types) {
    if constexpr (kHolds<Choice<decltype(types)...>>) {
      return f(types...);
    } else {
      return left_out();
    }
  };
}

namespace sm90 {

template <int kHeadDim, class F>
Status with_forward_tile(const Problem& p, int multiprocessors, F&& f) {
  return choose_forward_tile<kHeadDim>(p, multiprocessors, if_held(f));
}
template <int kHeadDim, class F>
Status with_backward_tile(const Problem& p, F&& f) {
  return choose_backward_tile<kHeadDim>(p, if_held(f));
}
template <int kHeadDim, class F>
Status with_backward_wide_tile(const Problem& p, F&& f) {
  return choose_backward_wide_tile<kHeadDim>(p, if_held(f));
}
template <int kHeadDim, class F>
Status with_backward_query_tile(const Problem& p, F&& f) {
  return choose_backward_query_tile<kHeadDim>(p, if_held(f));
}
template <int kHeadDim, class F>
Status with_backward_bias_tile(const Problem& p, F&& f) {
  return choose_backward_bias_tile<kHeadDim>(p, if_held(f));
}

// The JFA_CHOICES that a call comes to. One that is missing makes the mutant's call end with left_out(), which no test
// takes for a fault.
template <int kHeadDim>
std::string choices(const Problem& p, bool is_backward, int multiprocessors) {
  std::string list;
  const auto add = [&](auto... types) {
    char* name = abi::__cxa_demangle(typeid(Choice<decltype(types)...>).name(), nullptr, nullptr, nullptr);
    list += (list.empty() ? "" : ", ") + std::string(name);
    free(name);
  };
  if (!is_backward) {
    choose_forward_tile<kHeadDim>(p, multiprocessors, add);
    return list;
  }
  if constexpr (kHeadDim <= 128) {
    choose_backward_tile<kHeadDim>(p, add);
  } else {
    choose_backward_wide_tile<kHeadDim>(p, add);
    choose_backward_query_tile<kHeadDim>(p, add);
  }
  if (p.scores.bias.data != nullptr && has_bias_tiles(p)) choose_backward_bias_tile<kHeadDim>(p, add);
  return list;
}

}  // namespace sm90
}  // namespace jfa
