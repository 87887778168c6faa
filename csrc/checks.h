// What operators refuse, for both devices, before any memory is touched. Messages name argument and value; the
// pure-PyTorch operators (torchzygote/native/_checks.py) say the same.

#pragma once

#include "common.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <type_traits>
#include <string>

namespace torchzygote {

inline std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < x.dim(); ++i) {
    text << (i > 0 ? ", " : "") << x.size(i);
  }
  text << ")";
  return text.str();
}

inline std::string item_of(const char* name, size_t i) {
  std::ostringstream text;
  text << name << "[" << i << "]";
  return text.str();
}

inline std::string device_of(const Tensor& x) {
  if (x.is_cpu()) {
    return "cpu";
  }
  std::ostringstream text;
  text << (x.is_cuda() ? "cuda:" : "device ") << x.get_device_index();
  return text.str();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool is_complex(ScalarType dtype) {
  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble;
}

inline void check_matrix(const std::string& name, const Tensor& x) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  if (layout != aoti_torch_layout_strided()) {
    refuse(name, ": expected a strided tensor");
  }
  if (x.dim() != 2) {
    refuse(name, ": expected a matrix, got shape ", shape_of(x));
  }
}

// Elements that share memory can't be written one by one.
inline void check_written(const std::string& name, const Tensor& x) {
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) > 1 && x.stride(i) == 0) {
      refuse(name, ": expected elements with memory of their own, got an expanded tensor");
    }
  }
}

inline void check_like(const std::string& name, const Tensor& x, const std::string& other, const Tensor& like) {
  if (x.scalar_type() != like.scalar_type()) {
    refuse(name, ": expected the dtype of ", other, ", ", like.scalar_type(), ", got ", x.scalar_type());
  }
  if (!same_device(x, like)) {
    refuse(name, ": expected the device of ", other, ", ", device_of(like), ", got ", device_of(x));
  }
}

// Whether rows lo to lo + rows are among the first `most`; their end may be no int64_t.
inline bool lie_within(int64_t lo, int64_t rows, int64_t most) {
  return rows <= most && lo <= most - rows;
}

inline uint64_t end_of(int64_t lo, int64_t rows) {
  return static_cast<uint64_t>(lo) + static_cast<uint64_t>(rows);
}

inline void check_range(int64_t lo, int64_t rows, int64_t most) {
  if (lo < 0) {
    refuse("lo: expected at least 0, got ", lo);
  }
  if (!lie_within(lo, rows, most)) {
    refuse("hi: expected at most the number of columns, ", most, ", got ", end_of(lo, rows));
  }
}

inline void check_integers(const std::string& name, const Tensor& x, int64_t size, const Tensor& device) {
  if (x.scalar_type() != ScalarType::Long && x.scalar_type() != ScalarType::Int) {
    refuse(name, ": expected int64 or int32, got ", x.scalar_type());
  }
  if (x.dim() != 1 || x.size(0) != size) {
    refuse(name, ": expected shape (", size, "), got ", shape_of(x));
  }
  if (!same_device(x, device)) {
    refuse(name, ": expected the device ", device_of(device), ", got ", device_of(x));
  }
}

// Whether all of x lies between the bounds: a difference below zero leaves its sign in the sum of bits. Without
// comparisons, so that compilers vectorize it for any processor.
template <typename Index>
bool all_within(const Index* data, int64_t stride, int64_t begin, int64_t end, int64_t least, int64_t most) {
  using Bits = std::make_unsigned_t<Index>;
  const auto low = static_cast<Bits>(least);
  const auto high = static_cast<Bits>(std::min<int64_t>(most, std::numeric_limits<Index>::max()));
  Bits signs = 0;
  if (stride == 1) {
    for (int64_t i = begin; i < end; ++i) {
      const auto x = static_cast<Bits>(data[i]);
      signs |= (x - low) | (high - x);
    }
  } else {
    for (int64_t i = begin; i < end; ++i) {
      const auto x = static_cast<Bits>(data[i * stride]);
      signs |= (x - low) | (high - x);
    }
  }
  return signs >> (sizeof(Index) * 8 - 1) == 0;
}

template <typename Index>
std::pair<int64_t, int64_t> extremes(const Tensor& x, int64_t least, int64_t below) {
  const Index* data = static_cast<const Index*>(x.const_data_ptr());
  const int64_t stride = x.stride(0);
  std::atomic<bool> within{true};
  torch::stable::parallel_for(0, x.size(0), 1 << 16, [&](int64_t begin, int64_t end) {
    if (!all_within(data, stride, begin, end, least, below - 1)) {
      within = false;
    }
  });
  if (within) {
    return {least, below - 1};
  }
  int64_t smallest = std::numeric_limits<int64_t>::max();
  int64_t largest = std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < x.size(0); ++i) {
    smallest = std::min(smallest, static_cast<int64_t>(data[i * stride]));
    largest = std::max(largest, static_cast<int64_t>(data[i * stride]));
  }
  return {smallest, largest};
}

// On another device than the CPU torch's own reduction does it; reading its result waits for the stream.
inline std::pair<int64_t, int64_t> extremes_on_device(const Tensor& x) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x),
      torch::stable::detail::from(std::optional<int64_t>()),
      torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::aminmax", "", stack.data(), TORCH_ABI_VERSION));
  const auto smallest = torch::stable::detail::to<Tensor>(stack[0]);
  const auto largest = torch::stable::detail::to<Tensor>(stack[1]);
  const auto value = [&x](const Tensor& scalar) {
    if (x.scalar_type() == ScalarType::Int) {
      int32_t found = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_item_int32(scalar.get(), &found));
      return static_cast<int64_t>(found);
    }
    int64_t found = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(scalar.get(), &found));
    return found;
  };
  return {value(smallest), value(largest)};
}

// least <= x < below. Tensors are known to be on the device of the library that this is compiled into.
inline void check_values(
    const std::string& name, const Tensor& x, int64_t least, int64_t below = std::numeric_limits<int64_t>::max()) {
  if (x.numel() == 0) {
    return;
  }
#ifdef USE_CUDA
  const std::pair<int64_t, int64_t> found = extremes_on_device(x);
#else
  const std::pair<int64_t, int64_t> found = x.scalar_type() == ScalarType::Int ? extremes<int32_t>(x, least, below)
                                                                               : extremes<int64_t>(x, least, below);
#endif
  if (found.first < least) {
    refuse(name, ": expected at least ", least, ", got ", found.first);
  }
  if (found.second >= below) {
    refuse(name, ": expected less than ", below, ", got ", found.second);
  }
}

inline void check_seed_rows(const Tensor& out, int64_t lo, const std::optional<Tensor>& colors) {
  check_matrix("out", out);
  check_written("out", out);
  if (!colors.has_value()) {
    check_range(lo, out.size(0), out.size(1));
    return;
  }
  check_range(lo, 0, std::numeric_limits<int64_t>::max());
  check_integers("colors", *colors, out.size(1), out);
  check_values("colors", *colors, -1);
}

inline void check_scatter_rows(const std::vector<Tensor>& blocks, const std::vector<Tensor>& products, int64_t lo) {
  if (blocks.size() != products.size()) {
    refuse("products: expected ", blocks.size(), ", one for each block, got ", products.size());
  }
  if (lo < 0) {
    refuse("lo: expected at least 0, got ", lo);
  }
  const int64_t rows = products.empty() || products[0].dim() == 0 ? 0 : products[0].size(0);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Tensor& block = blocks[i];
    const Tensor& product = products[i];
    const std::string name = item_of("products", i);
    check_matrix(item_of("blocks", i), block);
    check_written(item_of("blocks", i), block);
    if (product.dim() == 0 || product.size(0) != rows || product.numel() != rows * block.size(1)) {
      refuse(name, ": expected ", rows, " rows of ", block.size(1), " elements, got shape ", shape_of(product));
    }
    if (!lie_within(lo, rows, block.size(0))) {
      refuse(item_of("blocks", i), ": expected at least ", end_of(lo, rows), " rows, got ", block.size(0));
    }
    if (!same_device(product, block)) {
      refuse(name, ": expected the device of its block, ", device_of(block), ", got ", device_of(product));
    }
    if (is_complex(product.scalar_type()) && !is_complex(block.scalar_type())) {
      refuse(
          name, ": expected a real dtype for a block of ", block.scalar_type(), ", got ", product.scalar_type());
    }
  }
}

inline void check_gather_diagonal(
    const Tensor& out, const Tensor& products, int64_t lo, const std::optional<Tensor>& colors) {
  check_matrix("products", products);
  const int64_t rows = products.size(0);
  const int64_t columns = products.size(1);
  check_range(lo, colors.has_value() ? 0 : rows, colors.has_value() ? std::numeric_limits<int64_t>::max() : columns);
  const int64_t size = colors.has_value() ? columns : rows;
  if (out.dim() != 1 || out.size(0) != size) {
    refuse("out: expected shape (", size, "), got ", shape_of(out));
  }
  check_written("out", out);
  check_like("out", out, "products", products);
  if (colors.has_value()) {
    check_integers("colors", *colors, columns, products);
    check_values("colors", *colors, -1);
  }
}

inline void check_slots(const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column) {
  check_matrix("products", products);
  if (lo < 0) {
    refuse("lo: expected at least 0, got ", lo);
  }
  check_integers("slot_row", slot_row, slot_row.numel(), products);
  check_integers("slot_column", slot_column, slot_row.numel(), products);
  check_values("slot_row", slot_row, 0);
  check_values("slot_column", slot_column, 0, products.size(1));
}

inline void check_decompress(
    const Tensor& out, const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column) {
  check_slots(products, lo, slot_row, slot_column);
  if (out.dim() != 1 || out.size(0) != slot_row.size(0)) {
    refuse("out: expected shape (", slot_row.size(0), "), got ", shape_of(out));
  }
  check_written("out", out);
  check_like("out", out, "products", products);
}

inline void check_decompress_dense(
    const Tensor& out, const Tensor& products, int64_t lo, const Tensor& slot_row, const Tensor& slot_column,
    const Tensor& rows, const Tensor& columns) {
  check_slots(products, lo, slot_row, slot_column);
  check_matrix("out", out);
  check_written("out", out);
  check_like("out", out, "products", products);
  check_integers("rows", rows, slot_row.size(0), products);
  check_integers("columns", columns, slot_row.size(0), products);
  check_values("rows", rows, 0, out.size(0));
  check_values("columns", columns, 0, out.size(1));
}

inline void check_compress(
    const Tensor& out, const Tensor& row_ptr, const Tensor& columns, const Tensor& values, const Tensor& colors) {
  check_matrix("out", out);
  check_written("out", out);
  const ScalarType dtype = out.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::ComplexFloat &&
      dtype != ScalarType::ComplexDouble) {
    refuse("out: expected float32, float64, complex64 or complex128, got ", dtype);
  }
  check_like("values", values, "out", out);
  check_integers("row_ptr", row_ptr, out.size(1) + 1, out);
  check_integers("columns", columns, columns.numel(), out);
  if (values.dim() != 1 || values.size(0) != columns.size(0)) {
    refuse("values: expected shape (", columns.size(0), "), got ", shape_of(values));
  }
  check_integers("colors", colors, colors.numel(), out);
  check_values("row_ptr", row_ptr, 0, values.size(0) + 1);
  check_values("columns", columns, 0, colors.size(0));
  check_values("colors", colors, -1, out.size(0));
}

}  // namespace torchzygote
