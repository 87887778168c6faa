// What every kernel launch needs: the right device and stream, a grid that covers the work, nothing for an empty one,
// and a look at what the launch came to.

#pragma once

#include "../checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <algorithm>

namespace torchzygote {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // beyond, threads take several elements each

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Within its scope the tensor's device is the current one.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const {
    return stream_;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline int blocks_for(int64_t count) {
  return static_cast<int>(std::min(kMaxBlocks, (count + kThreads - 1) / kThreads));
}

// The one place that is not C++. Without nvcc it is a test that compiles this: tests/native/cuda_on_host has a
// cuda_runtime.h whose launch runs all threads on the CPU.
template <typename... Parameters, typename... Args>
void start(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, const OnDevice& device,
    const Args&... args) {
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, device.stream()>>>(args...);
#else
  cuda_on_host::launch(kernel, grid, threads, device.stream(), args...);
#endif
  check_cuda(cudaGetLastError(), name);
}

// One thread for each of count elements, or several elements for each thread.
template <typename... Parameters, typename... Args>
void launch(const char* name, void (*kernel)(Parameters...), int64_t count, const OnDevice& device, const Args&... args) {
  if (count == 0) {
    return;
  }
  start(name, kernel, blocks_for(count), kThreads, device, args...);
}

// The same for a matrix: threads along its columns, rows in the second dimension of the grid.
template <typename... Parameters, typename... Args>
void launch_rows(
    const char* name, void (*kernel)(Parameters...), int64_t rows, int64_t columns, int64_t layers,
    const OnDevice& device, const Args&... args) {
  if (rows == 0 || columns == 0 || layers == 0) {
    return;
  }
  unsigned across = kThreads;
  while (across > 1 && across / 2 >= columns) {
    across /= 2;
  }
  const unsigned down = kThreads / across;
  const dim3 threads(across, down);
  const dim3 grid(
      static_cast<unsigned>(std::min<int64_t>(kMaxBlocks, (columns + across - 1) / across)),
      static_cast<unsigned>(std::min<int64_t>(16384, (rows + down - 1) / down)), static_cast<unsigned>(layers));
  start(name, kernel, grid, threads, device, args...);
}

// For loops over all elements, and over rows and columns.
__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t element_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}
__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}
__device__ inline int64_t row_step() {
  return static_cast<int64_t>(gridDim.y) * blockDim.y;
}

}  // namespace torchzygote
