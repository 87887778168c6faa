// Entries of a matrix from a chunk of its colored products: into CSR values, or into a dense matrix.

#include "launch.cuh"

#include <torch/csrc/stable/library.h>

namespace torchzygote {
namespace {

// An index tensor of either type, told apart where it is read: one kernel serves all combinations.
struct Indices {
  const void* data;
  int64_t stride;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<int64_t>(static_cast<const int32_t*>(data)[i * stride]);
  }
};

Indices indices(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.scalar_type() == ScalarType::Long};
}

struct Shape {
  int64_t rows, row_stride, column_stride, lo;
};

template <typename T>
__global__ void read_values(T* out, int64_t stride, const T* products, Shape shape, Indices row, Indices column, int64_t count) {
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const int64_t r = row[e] - shape.lo;
    if (r >= 0 && r < shape.rows) {
      out[e * stride] = products[r * shape.row_stride + column[e] * shape.column_stride];
    }
  }
}

template <typename T>
__global__ void read_dense(
    T* out, int64_t row_stride, int64_t column_stride, const T* products, Shape shape, Indices row, Indices column,
    Indices rows, Indices columns, int64_t count) {
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const int64_t r = row[e] - shape.lo;
    if (r >= 0 && r < shape.rows) {
      out[rows[e] * row_stride + columns[e] * column_stride] =
          products[r * shape.row_stride + column[e] * shape.column_stride];
    }
  }
}

Shape shape_of_products(const Tensor& products, int64_t lo) {
  return {products.size(0), products.stride(0), products.stride(1), lo};
}

}  // namespace

void decompress_cuda(
    const Tensor& out, const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column) {
  check_decompress(out, products, lo, slot_row, slot_column);
  const OnDevice device(products);
  if (products.numel() == 0) {
    return;
  }
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    launch(
        "decompress_", &read_values<T>, slot_row.size(0), device, static_cast<T*>(out.mutable_data_ptr()),
        out.stride(0), static_cast<const T*>(products.const_data_ptr()), shape_of_products(products, lo),
        indices(slot_row), indices(slot_column), slot_row.size(0));
  });
}

void decompress_dense_cuda(
    const Tensor& out, const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column,
    const Tensor& rows, const Tensor& columns) {
  check_decompress_dense(out, products, lo, slot_row, slot_column, rows, columns);
  const OnDevice device(products);
  if (products.numel() == 0) {
    return;
  }
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    launch(
        "decompress_dense_", &read_dense<T>, slot_row.size(0), device, static_cast<T*>(out.mutable_data_ptr()),
        out.stride(0), out.stride(1), static_cast<const T*>(products.const_data_ptr()),
        shape_of_products(products, lo), indices(slot_row), indices(slot_column), indices(rows), indices(columns),
        slot_row.size(0));
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CUDA, m) {
  m.impl("decompress_", TORCH_BOX(&torchzygote::decompress_cuda));
  m.impl("decompress_dense_", TORCH_BOX(&torchzygote::decompress_dense_cuda));
}
