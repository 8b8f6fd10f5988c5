// Launching a kernel and saying what went wrong, if something did.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace jfa {

// What a caller of the library is told. An empty message is success.
struct Status {
  enum class Code { kOk, kInvalidArgument, kUnimplemented, kInternal };
  Code code = Code::kOk;
  std::string message;

  static Status Ok() { return {}; }
  static Status InvalidArgument(std::string why) { return {Code::kInvalidArgument, std::move(why)}; }
  static Status Unimplemented(std::string why) { return {Code::kUnimplemented, std::move(why)}; }
  static Status Internal(std::string why) { return {Code::kInternal, std::move(why)}; }
  bool ok() const { return code == Code::kOk; }
};

// Status of a CUDA call; `what` names it.
inline Status cuda_status(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::Internal(what + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// One-dimensional grid and block; `cluster` neighbouring blocks run together and see each other's shared memory.
struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  size_t shared_bytes = 0;
  int cluster = 1;
};

// The launch's own return code is read, not the last error of the context, so that an older error is not blamed on this
// kernel.
template <class... Parameters, class... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
              const Arguments&... arguments) {
  if (grid.blocks == 0) return Status::Ok();
  const std::string what = std::string(name) + " with grid " + std::to_string(grid.blocks) + ", block " +
                           std::to_string(grid.threads) + ", " + std::to_string(grid.shared_bytes) +
                           " bytes of shared memory";
  if (grid.blocks > 0x7fffffff) return Status::Unimplemented(what + ": a grid has at most 2147483647 blocks");
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 48 * 1024) {  // what a kernel may have without asking
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) return cuda_status(error, what);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cuda_status(cudaLaunchKernelExC(&config, function, pointers), what);
}

}  // namespace jfa
