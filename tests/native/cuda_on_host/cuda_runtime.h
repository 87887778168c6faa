// As much of CUDA as the kernels in csrc/cuda use, on the CPU: found before the real header, so that a C++ compiler
// compiles them as they are, and a test runs them. Threads run one after another, to their ends; that is right for
// kernels whose threads don't wait for one another, and those here have no shared memory, barriers or atomics.
//
// What a launch must keep on a GPU is asked of it here, too: a grid and blocks that a GPU has, parameters that fit, the
// guard of a device, and that device's stream. Two environment variables say how a launch runs:
//
// CUDA_ON_HOST_ORDER   forward (by default), reverse, or interleaved: thread 0 of every block, then thread 1. Where
//                      two threads write to one place, or one reads what another writes, values differ between them.
// CUDA_ON_HOST_BLOCKS  at most so many blocks along x and y, so that each thread has several elements to do.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidResourceHandle = 400 };

inline constinit thread_local dim3 gridDim, blockDim;
inline constinit thread_local uint3 blockIdx{}, threadIdx{};

namespace cuda_on_host {

inline constexpr int32_t kNoDevice = -2;  // -1 is the CPU's
inline constinit thread_local int32_t device = kNoDevice;
inline constinit thread_local cudaError_t last_error = cudaSuccess;

// Another pointer for each device; nothing lies there.
inline cudaStream_t stream_of(int32_t of) {
  return reinterpret_cast<cudaStream_t>(static_cast<intptr_t>(64) * (of + 2));
}

// What the parameters take, each where its type may lie.
template <typename... Parameters>
constexpr size_t parameter_bytes() {
  size_t end = 0;
  ((end = (end + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
  return end;
}

inline bool possible(dim3 grid, dim3 block) {
  return grid.x >= 1 && grid.x <= 0x7FFFFFFF && grid.y >= 1 && grid.y <= 0xFFFF && grid.z >= 1 && grid.z <= 0xFFFF &&
         block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 && block.x <= 1024 && block.y <= 1024 &&
         block.x * block.y * block.z <= 1024;
}

template <typename F>
void for_all(dim3 grid, dim3 block, std::string_view order, const F& run) {
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const unsigned threads = block.x * block.y * block.z;
  const auto enter = [grid](uint64_t b) {
    blockIdx = {
        static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
        static_cast<unsigned>(b / grid.x / grid.y)};
  };
  const auto go = [&](unsigned t) {
    threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    run();
  };
  if (order == "interleaved") {
    for (unsigned t = 0; t < threads; ++t) {
      for (uint64_t b = 0; b < blocks; ++b) {
        enter(b);
        go(t);
      }
    }
    return;
  }
  const bool reverse = order == "reverse";
  for (uint64_t b = 0; b < blocks; ++b) {
    enter(reverse ? blocks - 1 - b : b);
    for (unsigned t = 0; t < threads; ++t) {
      go(reverse ? threads - 1 - t : t);
    }
  }
}

template <typename... Parameters>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
    const std::type_identity_t<Parameters>&... args) {
  static_assert(parameter_bytes<Parameters...>() <= 4096, "more than a kernel's parameters may take");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied as bytes");
  if (!possible(grid, block)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (device == kNoDevice || stream != stream_of(device)) {
    last_error = cudaErrorInvalidResourceHandle;
    return;
  }
  if (const char* most = std::getenv("CUDA_ON_HOST_BLOCKS")) {
    const auto limit = static_cast<unsigned>(std::atoi(most));
    grid = dim3(std::min(grid.x, limit), std::min(grid.y, limit), grid.z);
  }
  const char* order = std::getenv("CUDA_ON_HOST_ORDER");
  gridDim = grid;
  blockDim = block;
  for_all(grid, block, order == nullptr ? "forward" : order, [&] { kernel(args...); });
}

}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() {
  const cudaError_t found = cuda_on_host::last_error;
  cuda_on_host::last_error = cudaSuccess;
  return found;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "no guard of a device, or not the stream of that device";
  }
}
