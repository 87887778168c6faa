// What kernels on both sides share: names for torch's types, and elements as bits of their size.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace torchzygote {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Becomes a ValueError in Python.
template <typename... Args>
[[noreturn]] void refuse(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::invalid_argument(message.str());
}

// Aligned as its halves are on the CPU, where memory that torch did not allocate may lie anywhere.
#ifdef USE_CUDA
struct alignas(16) Bits128 {
#else
struct Bits128 {
#endif
  uint64_t low, high;
};

// Calls f with a value of an unsigned type as wide as an element: moving elements needs no more of their type.
template <typename F>
void with_bits(size_t element_size, const F& f) {
  switch (element_size) {
    case 1:
      return f(uint8_t{0});
    case 2:
      return f(uint16_t{0});
    case 4:
      return f(uint32_t{0});
    case 8:
      return f(uint64_t{0});
    case 16:
      return f(Bits128{0, 0});
    default:
      refuse("expected elements of 1 to 16 bytes, got ", element_size);
  }
}

// Calls f with a null pointer to the integer type of an index tensor.
template <typename F>
void with_index(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Int) {
    f(static_cast<const int32_t*>(nullptr));
  } else {
    f(static_cast<const int64_t*>(nullptr));
  }
}

// The bits of the number 1; complex numbers have theirs in the first half.
inline Bits128 bits_of_one(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::ComplexHalf:
      return {0x3C00, 0};
    case ScalarType::BFloat16:
      return {0x3F80, 0};
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return {0x3F800000, 0};
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return {0x3FF0000000000000, 0};
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return {1, 0};
    default:
      refuse("out: expected a floating, complex or integer dtype, got ", dtype);
  }
}

template <typename T>
T narrowed(Bits128 bits) {
  if constexpr (sizeof(T) == 16) {
    return bits;
  } else {
    return static_cast<T>(bits.low);
  }
}

}  // namespace torchzygote
