// From run-time values to template arguments, by folds over lists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "launch.h"
#include "problem.h"

namespace jfa {

template <int... kValues>
struct IntList {};

template <class T>
struct Type {
  using type = T;
};

// Calls f(std::integral_constant) with the first value of an ascending list that is at least `value`.
template <int... kValues, class F>
Status at_least(IntList<kValues...>, int value, const std::string& what, F&& f) {
  Status status = Status::Ok();
  const auto matches = [&](auto candidate) {
    if (value > candidate) return false;
    status = f(candidate);
    return true;
  };
  if ((matches(std::integral_constant<int, kValues>{}) || ...)) return status;
  std::string list;
  ((list += (list.empty() ? "" : ", ") + std::to_string(kValues)), ...);
  return Status::Unimplemented(what + " is " + std::to_string(value) + "; this build has kernels for up to " + list);
}

// Calls f(Type<element>).
template <class F>
Status with_element(ElementType type, F&& f) {
  if (type == ElementType::kHalf) return f(Type<__half>{});
  if (type == ElementType::kBfloat16) return f(Type<__nv_bfloat16>{});
  return Status::Unimplemented("query, key and value must be float16 or bfloat16");
}

// Calls f(std::bool_constant).
template <class F>
Status with_bool(bool value, F&& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace jfa
