// Diagonals of symmetric blocks from products that have each entry beside them twice, and whether both agree.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 12;
constexpr int kTile = 64;  // blocks that are read at once, so that each loop over them is vectorized

// Row a of all blocks: where it lies in each product, and where its diagonal goes.
template <typename T, int K>
struct Row {
  const T* of_product[K];
  int64_t stride_of_product[K];
  T* diagonal;
  int64_t stride;
};

template <typename T>
void read_row(const T* from, int64_t stride, const T* scales, int count, T (&to)[kTile]) {
  if (stride == 1) {
    for (int b = 0; b < count; ++b) {
      to[b] = scales[b] * from[b];
    }
  } else {
    for (int b = 0; b < count; ++b) {
      to[b] = scales[b] * from[b * stride];
    }
  }
}

// Column j of block b comes from product (j - shift) % K.
template <typename T, int K>
void put_in_order(const T (&read)[K][kTile], const T (&shift)[kTile], int count, T (&row)[K][kTile]) {
  for (int j = 0; j < K; ++j) {
    std::copy_n(read[j], count, row[j]);
    for (int s = 1; s < K; ++s) {
      const T(&shifted)[kTile] = read[(j - s + K) % K];
      const T wanted = static_cast<T>(s);
      for (int b = 0; b < count; ++b) {
        const T before = row[j][b];
        const T after = shifted[b];
        row[j][b] = shift[b] == wanted ? after : before;
      }
    }
  }
}

template <typename T>
int count_nonfinite(const T (&entries)[kTile], int count) {
  int bad = 0;
  for (int b = 0; b < count; ++b) {
    bad += std::abs(entries[b]) <= std::numeric_limits<T>::max() ? 0 : 1;
  }
  return bad;
}

template <typename T, int K>
bool agree_in(const T (&h)[K][K][kTile], int count, T slack) {
  int bad = 0;
  for (int a = 0; a < K; ++a) {
    for (int j = 0; j < K; ++j) {
      bad += count_nonfinite(h[a][j], count);
    }
    for (int j = a + 1; j < K; ++j) {
      for (int b = 0; b < count; ++b) {
        const T beside = std::abs(h[a][a][b]) + std::abs(h[j][j][b]);
        const T scale = std::abs(h[a][j][b]) + std::abs(h[j][a][b]) + beside;
        bad += std::abs(h[a][j][b] - h[j][a][b]) <= slack * scale ? 0 : 1;
      }
    }
  }
  return bad == 0;
}

template <typename T, int K>
bool read_blocks(
    const Row<T, K> (&rows)[K], const uint8_t* shifts, const T* scales, int64_t blocks, int64_t begin, int64_t end,
    T slack) {
  bool fine = true;
  T shift[kTile];
  T read[K][kTile];
  T h[K][K][kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, end - at));
    for (int b = 0; b < count; ++b) {
      shift[b] = static_cast<T>(shifts[at + b]);
    }
    for (int a = 0; a < K; ++a) {
      const Row<T, K>& row = rows[a];
      for (int c = 0; c < K; ++c) {
        const int64_t stride = row.stride_of_product[c];
        read_row(row.of_product[c] + at * stride, stride, scales + c * blocks + at, count, read[c]);
      }
      put_in_order<T, K>(read, shift, count, h[a]);
      for (int b = 0; b < count; ++b) {
        row.diagonal[(at + b) * row.stride] = h[a][a][b];
      }
    }
    fine &= agree_in<T, K>(h, count, slack);
  }
  return fine;
}

int64_t check_widths(const std::vector<int64_t>& widths) {
  int64_t k = 0;
  for (size_t i = 0; i < widths.size(); ++i) {
    if (widths[i] < 0 || widths[i] > 4) {
      refuse(item_of("widths", i), ": expected 0 to 4, got ", widths[i]);
    }
    k += widths[i];
  }
  if (k < 2 || k > 4) {
    refuse("widths: expected a sum of 2, 3 or 4, got ", k);
  }
  return k;
}

void check_products(
    const std::vector<Tensor>& products, const std::vector<int64_t>& widths, int64_t k, int64_t blocks) {
  if (products.size() != k * widths.size()) {
    refuse("products: expected ", k * widths.size(), ", one per column and input, got ", products.size());
  }
  const ScalarType dtype = products[0].scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse("products[0]: expected float32 or float64, got ", dtype);
  }
  for (size_t i = 0; i < products.size(); ++i) {
    check_like(item_of("products", i), products[i], "products[0]", products[0]);
    const int64_t size = blocks * widths[i % widths.size()];
    const bool even = products[i].dim() == 1 || products[i].is_contiguous();
    if (!even || products[i].numel() != size) {
      refuse(
          item_of("products", i), ": expected ", size, " elements, in a vector or contiguous, got shape ",
          shape_of(products[i]));
    }
  }
}

void check_draw(const Tensor& shifts, const Tensor& scales, const Tensor& like, int64_t k) {
  if (shifts.scalar_type() != ScalarType::Byte || shifts.dim() != 1 || !shifts.is_contiguous()) {
    refuse("shifts: expected a contiguous uint8 vector, got ", shifts.scalar_type(), " of shape ", shape_of(shifts));
  }
  if (!same_device(shifts, like)) {
    refuse("shifts: expected the device of products[0], ", device_of(like), ", got ", device_of(shifts));
  }
  check_like("scales", scales, "products[0]", like);
  const int64_t blocks = shifts.size(0);
  if (scales.dim() != 2 || scales.size(0) != k || scales.size(1) != blocks || !scales.is_contiguous()) {
    refuse("scales: expected a contiguous tensor of shape (", k, ", ", blocks, "), got ", shape_of(scales));
  }
}

void check_shifts(const uint8_t* shifts, int64_t blocks, int64_t k) {
  uint8_t largest = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    largest = std::max(largest, shifts[b]);
  }
  if (largest >= k) {
    refuse("shifts: expected less than ", k, ", got ", static_cast<int>(largest));
  }
}

template <typename T, int K>
bool run(
    const std::vector<Tensor>& products, const Tensor& shifts, const Tensor& scales,
    const std::vector<int64_t>& widths, const std::vector<Tensor>& diagonals, T slack) {
  Row<T, K> rows[K];
  int a = 0;
  for (size_t i = 0; i < widths.size(); ++i) {
    for (int64_t column = 0; column < widths[i]; ++column, ++a) {
      for (int c = 0; c < K; ++c) {
        const Tensor& product = products[c * widths.size() + i];
        const int64_t step = product.dim() == 1 ? product.stride(0) : 1;
        rows[a].of_product[c] = static_cast<const T*>(product.const_data_ptr()) + column * step;
        rows[a].stride_of_product[c] = widths[i] * step;
      }
      rows[a].diagonal = static_cast<T*>(diagonals[i].mutable_data_ptr()) + column;
      rows[a].stride = widths[i];
    }
  }
  const int64_t blocks = shifts.size(0);
  const auto* shift = static_cast<const uint8_t*>(shifts.const_data_ptr());
  const T* factors = static_cast<const T*>(scales.const_data_ptr());
  std::atomic<bool> agree{true};
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    if (!read_blocks<T, K>(rows, shift, factors, blocks, begin, end, slack)) {
      agree = false;
    }
  });
  return agree;
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> mirrored_blocks_cpu(
    const std::vector<Tensor>& products, const Tensor& shifts, const Tensor& scales,
    const std::vector<int64_t>& widths, double slack) {
  const int64_t k = check_widths(widths);
  if (shifts.dim() != 1) {
    refuse("shifts: expected a vector, got shape ", shape_of(shifts));
  }
  const int64_t blocks = shifts.size(0);
  check_products(products, widths, k, blocks);
  check_draw(shifts, scales, products[0], k);
  check_shifts(static_cast<const uint8_t*>(shifts.const_data_ptr()), blocks, k);
  std::vector<Tensor> diagonals;
  for (const int64_t width : widths) {
    diagonals.push_back(torch::stable::empty({blocks * width}, products[0].scalar_type()));
  }
  Tensor agree = torch::stable::empty({}, ScalarType::Bool);
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    const auto one = k == 2 ? run<T, 2> : k == 3 ? run<T, 3> : run<T, 4>;
    *static_cast<bool*>(agree.mutable_data_ptr()) =
        one(products, shifts, scales, widths, diagonals, static_cast<T>(slack));
  };
  if (products[0].scalar_type() == ScalarType::Float) {
    with(0.0F);
  } else {
    with(0.0);
  }
  return {diagonals, agree};
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("mirrored_blocks", TORCH_BOX(&torchzygote::mirrored_blocks_cpu));
}
