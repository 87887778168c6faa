// Diagonal entries of a chunk of products.

#include "launch.cuh"

#include <torch/csrc/stable/library.h>

namespace torchzygote {
namespace {

template <typename T>
__global__ void gather_rows(T* out, int64_t out_stride, const T* products, int64_t step, int64_t rows) {
  for (int64_t r = first_element(); r < rows; r += element_step()) {
    out[r * out_stride] = products[r * step];
  }
}

template <typename T, typename Index>
__global__ void gather_colors(
    T* out, int64_t out_stride, const T* products, int64_t row_stride, int64_t column_stride, int64_t rows,
    int64_t columns, int64_t lo, const Index* colors, int64_t colors_stride) {
  for (int64_t i = first_element(); i < columns; i += element_step()) {
    const int64_t r = static_cast<int64_t>(colors[i * colors_stride]) - lo;
    if (r >= 0 && r < rows) {
      out[i * out_stride] = products[r * row_stride + i * column_stride];
    }
  }
}

}  // namespace

void gather_diagonal_cuda(
    const Tensor& out, const Tensor& products, int64_t lo, const std::optional<Tensor>& colors) {
  check_gather_diagonal(out, products, lo, colors);
  const OnDevice device(products);
  if (products.numel() == 0) {
    return;
  }
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const T* from = static_cast<const T*>(products.const_data_ptr());
    const int64_t row_stride = products.stride(0);
    const int64_t column_stride = products.stride(1);
    if (!colors.has_value()) {
      launch(
          "gather_diagonal_", &gather_rows<T>, products.size(0), device, to, out.stride(0),
          from + lo * column_stride, row_stride + column_stride, products.size(0));
      return;
    }
    with_index(*colors, [&](auto* null) {
      using Index = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
      launch(
          "gather_diagonal_", &gather_colors<T, Index>, products.size(1), device, to, out.stride(0), from, row_stride,
          column_stride, products.size(0), products.size(1), lo,
          static_cast<const Index*>(colors->const_data_ptr()), colors->stride(0));
    });
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CUDA, m) {
  m.impl("gather_diagonal_", TORCH_BOX(&torchzygote::gather_diagonal_cuda));
}
