// What TMA needs to know of a tensor, made on the host.
#pragma once

#include <cuda.h>

#include "launch.h"
#include "problem.h"

namespace jfa::sm90 {

using TensorMap = CUtensorMap;

// Boxes of `rows` rows of `row_bytes` (128, 64 or 32) of one head, which land in shared memory with the swizzle of as
// many bytes. Of 128: the 16-byte chunk c of row r lies in place c ^ r % 8 of its row. Coordinates are (column, row,
// head, batch). Elements of two bytes, or bools.
Status make_tensor_map(TensorMap& map, const Tensor& tensor, ElementType type, int dim, int length, int heads,
                       int batch, int rows, int row_bytes = 128);

}  // namespace jfa::sm90
