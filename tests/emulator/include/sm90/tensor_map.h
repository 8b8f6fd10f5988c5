// Stands in for csrc/sm90/tensor_map.h: what the driver refuses is refused here.
#pragma once

#include <algorithm>
#include <string>

#include "launch.h"
#include "problem.h"
#include "tma.h"

namespace jfa::sm90 {

using TensorMap = emulator::TensorMap;

inline Status make_tensor_map(TensorMap& map, const Tensor& tensor, ElementType type, int dim, int length, int heads,
                              int batch, int rows, int row_bytes = 128) {
  const int element_bytes = type == ElementType::kBool ? 1 : 2;
  map = TensorMap();
  map.base = static_cast<unsigned char*>(tensor.data);
  map.element_bytes = element_bytes;
  map.rank = 4;
  map.swizzle = row_bytes;
  const int extents[4] = {dim, std::max(length, 1), std::max(heads, 1), std::max(batch, 1)};
  const int64_t strides[3] = {tensor.row_stride, tensor.head_stride, tensor.batch_stride};
  const int box[4] = {row_bytes / element_bytes, rows, 1, 1};
  std::copy(extents, extents + 4, map.extents);
  for (int i = 0; i < 3; ++i) map.strides[i] = uint64_t(strides[i]) * element_bytes;
  for (int i = 0; i < 4; ++i) map.box[i] = uint16_t(std::clamp(box[i], 0, 0xffff));
  const std::string why = emulator::why_refused(map);
  return why.empty() ? Status::Ok() : Status::InvalidArgument("the tensor map was refused: " + why);
}

}  // namespace jfa::sm90
