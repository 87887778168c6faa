// Seeds for a chunk of rows or colors.

#include "launch.cuh"

#include <torch/csrc/stable/library.h>

namespace torchzygote {
namespace {

template <typename T>
__global__ void seed_diagonal(
    T* out, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, int64_t lo, T one, T zero) {
  for (int64_t r = first_row(); r < rows; r += row_step()) {
    for (int64_t i = first_element(); i < columns; i += element_step()) {
      out[r * row_stride + i * column_stride] = i == lo + r ? one : zero;
    }
  }
}

template <typename T, typename Index>
__global__ void seed_colors(
    T* out, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, int64_t lo, T one, T zero,
    const Index* colors, int64_t stride) {
  for (int64_t i = first_element(); i < columns; i += element_step()) {
    const int64_t color = static_cast<int64_t>(colors[i * stride]) - lo;
    for (int64_t r = first_row(); r < rows; r += row_step()) {
      out[r * row_stride + i * column_stride] = r == color ? one : zero;
    }
  }
}

}  // namespace

void seed_rows_cuda(const Tensor& out, int64_t lo, const std::optional<Tensor>& colors) {
  check_seed_rows(out, lo, colors);
  const OnDevice device(out);
  const Bits128 one = bits_of_one(out.scalar_type());
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (!colors.has_value()) {
      launch_rows(
          "seed_rows_", &seed_diagonal<T>, out.size(0), out.size(1), 1, device, to, out.stride(0), out.stride(1),
          out.size(0), out.size(1), lo, narrowed<T>(one), zero);
      return;
    }
    with_index(*colors, [&](auto* null) {
      using Index = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
      launch_rows(
          "seed_rows_", &seed_colors<T, Index>, out.size(0), out.size(1), 1, device, to, out.stride(0),
          out.stride(1), out.size(0), out.size(1), lo, narrowed<T>(one), zero,
          static_cast<const Index*>(colors->const_data_ptr()), colors->stride(0));
    });
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CUDA, m) {
  m.impl("seed_rows_", TORCH_BOX(&torchzygote::seed_rows_cuda));
}
