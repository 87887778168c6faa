// Diagonal entries of a chunk of products.

#include "blocks.h"

#include <torch/csrc/stable/library.h>

#include <type_traits>

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
struct Colored {
  T* out;
  int64_t out_stride;
  const T* products;
  int64_t row_stride, column_stride, rows, lo;
  const Index* colors;
  int64_t colors_stride;

  void gather(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = static_cast<int64_t>(colors[i * colors_stride]) - lo;
      if (r >= 0 && r < rows) {
        out[i * out_stride] = products[r * row_stride + i * column_stride];
      }
    }
  }

  // The same where everything lies side by side and all colors are among the rows: half the time.
  void gather_all(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = products[(static_cast<int64_t>(colors[i]) - lo) * row_stride + i];
    }
  }
};

template <typename T, typename Index>
void gather_colors(const Colored<T, Index>& of, int64_t columns) {
  const bool side_by_side = of.out_stride == 1 && of.column_stride == 1 && of.colors_stride == 1;
  torch::stable::parallel_for(0, columns, kGrain, [&](int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t first, int64_t last) {
      if (side_by_side && all_among(of.colors, first, last, of.lo, of.rows)) {
        of.gather_all(first, last);
      } else {
        of.gather(first, last);
      }
    });
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
      using Index = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
      const Colored<T, Index> of{
          to, out.stride(0), from, row_stride, column_stride, products.size(0), lo, data, colors->stride(0)};
      gather_colors(of, products.size(1));
    });
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("gather_diagonal_", TORCH_BOX(&torchzygote::gather_diagonal_cpu));
}
