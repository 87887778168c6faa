// Entries of a matrix from a chunk of its colored products: into CSR values, or into a dense matrix.

#include "blocks.h"

#include <torch/csrc/stable/library.h>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 14;

template <typename T>
struct Products {
  const T* data;
  int64_t rows, row_stride, column_stride, lo;

  explicit Products(const Tensor& x, int64_t lo)
      : data(static_cast<const T*>(x.const_data_ptr())),
        rows(x.size(0)),
        row_stride(x.stride(0)),
        column_stride(x.stride(1)),
        lo(lo) {}
};

// Index tensors of one call may differ in type: each is read through this.
template <typename Index>
struct Indices {
  const Index* data;
  int64_t stride;

  explicit Indices(const Tensor& x) : data(static_cast<const Index*>(x.const_data_ptr())), stride(x.stride(0)) {}

  int64_t operator[](int64_t i) const {
    return static_cast<int64_t>(data[i * stride]);
  }
};

// Everything by value: what lay in memory would be read again after each write.
template <typename T, typename Rows, typename Columns, typename To>
void read_slots(Products<T> products, Rows slot_row, Columns slot_column, int64_t count, To to) {
  const bool side_by_side = slot_row.stride == 1 && slot_column.stride == 1 && products.column_stride == 1;
  torch::stable::parallel_for(0, count, kGrain, [=](int64_t begin, int64_t end) {
    for_blocks(begin, end, [=](int64_t first, int64_t last) {
      if (side_by_side && all_among(slot_row.data, first, last, products.lo, products.rows)) {
        for (int64_t e = first; e < last; ++e) {
          const int64_t r = static_cast<int64_t>(slot_row.data[e]) - products.lo;
          to(e, products.data[r * products.row_stride + static_cast<int64_t>(slot_column.data[e])]);
        }
        return;
      }
      for (int64_t e = first; e < last; ++e) {
        const int64_t r = slot_row[e] - products.lo;
        if (r >= 0 && r < products.rows) {
          to(e, products.data[r * products.row_stride + slot_column[e] * products.column_stride]);
        }
      }
    });
  });
}

template <typename F>
void with_indices(const Tensor& x, const F& f) {
  with_index(x, [&](auto* null) { f(Indices<std::remove_const_t<std::remove_pointer_t<decltype(null)>>>(x)); });
}

}  // namespace

void decompress_cpu(
    const Tensor& out, const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column) {
  check_decompress(out, products, lo, slot_row, slot_column);
  if (out.numel() == 0 || products.numel() == 0) {
    return;
  }
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t stride = out.stride(0);
    with_indices(slot_row, [&](const auto& rows) {
      with_indices(slot_column, [&](const auto& columns) {
        read_slots(Products<T>(products, lo), rows, columns, out.size(0), [to, stride](int64_t e, T value) {
          to[e * stride] = value;
        });
      });
    });
  });
}

void decompress_dense_cpu(
    const Tensor& out, const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column,
    const Tensor& rows, const Tensor& columns) {
  check_decompress_dense(out, products, lo, slot_row, slot_column, rows, columns);
  if (slot_row.numel() == 0 || products.numel() == 0) {
    return;
  }
  // the places to write to are of one type: a matrix has one kind of index, and slots are converted to it
  const auto wide = [](const Tensor& x) { return torch::stable::to(x, ScalarType::Long); };
  const Tensor slots = wide(slot_row);
  const Tensor positions = wide(slot_column);
  const Tensor heights = wide(rows);
  const Tensor widths = wide(columns);
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t row_stride = out.stride(0);
    const int64_t column_stride = out.stride(1);
    const Indices<int64_t> i(heights);
    const Indices<int64_t> j(widths);
    read_slots(
        Products<T>(products, lo), Indices<int64_t>(slots), Indices<int64_t>(positions), slots.size(0),
        [=](int64_t e, T value) { to[i[e] * row_stride + j[e] * column_stride] = value; });
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("decompress_", TORCH_BOX(&torchzygote::decompress_cpu));
  m.impl("decompress_dense_", TORCH_BOX(&torchzygote::decompress_dense_cpu));
}
