// Diagonal entries of a chunk of products.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 14;

template <typename T>
void gather_rows(T* out, int64_t out_stride, const T* products, int64_t step, int64_t rows) {
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      out[r * out_stride] = products[r * step];
    }
  });
}

template <typename T, typename Index>
void gather_colors(
    T* out, int64_t out_stride, const T* products, int64_t row_stride, int64_t column_stride, int64_t rows,
    int64_t columns, int64_t lo, const Index* colors, int64_t colors_stride) {
  torch::stable::parallel_for(0, columns, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = static_cast<int64_t>(colors[i * colors_stride]) - lo;
      if (r >= 0 && r < rows) {
        out[i * out_stride] = products[r * row_stride + i * column_stride];
      }
    }
  });
}

}  // namespace

void gather_diagonal_cpu(const Tensor& out, const Tensor& products, int64_t lo, const std::optional<Tensor>& colors) {
  check_gather_diagonal(out, products, lo, colors);
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
      gather_rows(to, out.stride(0), from + lo * column_stride, row_stride + column_stride, products.size(0));
      return;
    }
    with_index(*colors, [&](auto* null) {
      const auto* data = static_cast<decltype(null)>(colors->const_data_ptr());
      gather_colors(
          to, out.stride(0), from, row_stride, column_stride, products.size(0), products.size(1), lo, data,
          colors->stride(0));
    });
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("gather_diagonal_", TORCH_BOX(&torchzygote::gather_diagonal_cpu));
}
