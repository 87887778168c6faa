// Colored products of a known CSR matrix: row c of the result sums the columns of color c.

#include "launch.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/complex.h>

namespace torchzygote {
namespace {

// A column of the result belongs to one row of the matrix, and that to one thread: nothing is added atomically.
template <typename T>
__global__ void sum_columns(
    T* out, int64_t row_stride, int64_t column_stride, int64_t rows, const int64_t* row_ptr, const int64_t* columns,
    const T* values, const int64_t* colors) {
  for (int64_t i = first_element(); i < rows; i += element_step()) {
    for (int64_t e = row_ptr[i]; e < row_ptr[i + 1]; ++e) {
      const int64_t color = colors[columns[e]];
      if (color >= 0) {
        out[color * row_stride + i * column_stride] += values[e];
      }
    }
  }
}

template <typename T>
void run(
    const OnDevice& device, const Tensor& out, const Tensor& row_ptr, const Tensor& columns, const Tensor& values,
    const Tensor& colors) {
  const auto wide = [](const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Long)); };
  const Tensor starts = wide(row_ptr);
  const Tensor positions = wide(columns);
  const Tensor numbers = wide(colors);
  const Tensor entries = torch::stable::contiguous(values);
  const auto data = [](const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); };
  launch(
      "compress_", &sum_columns<T>, out.size(1), device, static_cast<T*>(out.mutable_data_ptr()), out.stride(0),
      out.stride(1), out.size(1), data(starts), data(positions), static_cast<const T*>(entries.const_data_ptr()),
      data(numbers));
}

}  // namespace

void compress_cuda(
    const Tensor& out, const Tensor& row_ptr, const Tensor& columns, const Tensor& values, const Tensor& colors) {
  check_compress(out, row_ptr, columns, values, colors);
  const OnDevice device(out);
  Tensor zeroed = out;
  torch::stable::zero_(zeroed);
  if (values.numel() == 0 || out.numel() == 0) {
    return;
  }
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return run<float>(device, out, row_ptr, columns, values, colors);
    case ScalarType::Double:
      return run<double>(device, out, row_ptr, columns, values, colors);
    case ScalarType::ComplexFloat:
      return run<torch::headeronly::complex<float>>(device, out, row_ptr, columns, values, colors);
    default:
      return run<torch::headeronly::complex<double>>(device, out, row_ptr, columns, values, colors);
  }
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CUDA, m) {
  m.impl("compress_", TORCH_BOX(&torchzygote::compress_cuda));
}
