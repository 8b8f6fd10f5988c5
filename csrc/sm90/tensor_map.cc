#include "sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace jfa::sm90 {
namespace {

// libcuda is not linked: the package is imported on machines without a driver.
Status find_encoder(decltype(&cuTensorMapEncodeTiled)& encoder) {
  static void* found = nullptr;
  static const cudaError_t error = [] {
    cudaDriverEntryPointQueryResult result;
    return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  }();
  encoder = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  if (error == cudaSuccess && found == nullptr) return Status::Internal("the driver has no cuTensorMapEncodeTiled");
  return cuda_status(error, "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
}

}  // namespace

Status make_tensor_map(TensorMap& map, const Tensor& tensor, ElementType type, int dim, int length, int heads,
                       int batch, int rows, int row_bytes) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (const Status status = find_encoder(encode); !status.ok()) return status;
  const cuuint64_t element_bytes = type == ElementType::kBool ? 1 : 2;
  const auto data_type = type == ElementType::kBool   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                         : type == ElementType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  // An empty dimension is not allowed. The copy of one that holds nothing is never asked for inside it.
  const cuuint64_t extents[4] = {cuuint64_t(dim), cuuint64_t(std::max(length, 1)), cuuint64_t(std::max(heads, 1)),
                                 cuuint64_t(std::max(batch, 1))};
  const cuuint64_t strides_bytes[3] = {tensor.row_stride * element_bytes, tensor.head_stride * element_bytes,
                                       tensor.batch_stride * element_bytes};
  const cuuint32_t box[4] = {cuuint32_t(row_bytes / element_bytes), cuuint32_t(rows), 1, 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, data_type, 4, tensor.data, extents, strides_bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::Ok();
  return Status::InvalidArgument("cuTensorMapEncodeTiled returned " + std::to_string(result) + " for extents " +
                                 std::to_string(dim) + ", " + std::to_string(length) + ", " + std::to_string(heads) +
                                 ", " + std::to_string(batch) + " and row, head, batch strides of " +
                                 std::to_string(strides_bytes[0]) + ", " + std::to_string(strides_bytes[1]) + ", " +
                                 std::to_string(strides_bytes[2]) + " bytes");
}

}  // namespace jfa::sm90
