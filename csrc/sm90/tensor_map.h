// What TMA needs to know of a tensor, made on the host.
#pragma once

#include <cuda.h>

#include "launch.h"
#include "problem.h"

namespace jfa::sm90 {

using TensorMap = CUtensorMap;

// Boxes of `rows` rows of 64 columns (128 bytes) of one head, which land in shared memory with the 128-byte swizzle:
// the 16-byte chunk c of row r lies in place c ^ r % 8 of its row. Coordinates are (column, row, head, batch).
Status make_tensor_map(TensorMap& map, const Tensor& tensor, ElementType type, int dim, int length, int heads,
                       int batch, int rows);

}  // namespace jfa::sm90
