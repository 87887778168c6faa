// Diagonals of symmetric blocks from products that have each entry beside them twice, and whether both agree.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 12;

// Row a of all blocks: where it lies in each product, and where its diagonal goes.
template <typename T, int K>
struct Row {
  const T* of_product[K];
  T* diagonal;
  int64_t stride;
};

// Stride: that of all rows, or 0 where they differ.
template <typename T, int K, int Stride>
bool read_blocks(
    const Row<T, K> (&rows)[K], const uint8_t* shifts, const T* scales, int64_t blocks, int64_t begin, int64_t end,
    T slack) {
  bool fine = true;
  for (int64_t b = begin; b < end; ++b) {
    const int shift = shifts[b];
    T h[K][K];
    for (int a = 0; a < K; ++a) {
      const int64_t at = b * (Stride > 0 ? Stride : rows[a].stride);
      T read[K];
      for (int c = 0; c < K; ++c) {
        read[c] = scales[c * blocks + b] * rows[a].of_product[c][at];
      }
      for (int j = 0; j < K; ++j) {
        T entry = read[j];
        for (int s = 1; s < K; ++s) {
          entry = shift == s ? read[(j - s + K) % K] : entry;
        }
        h[a][j] = entry;
        fine &= std::abs(entry) <= std::numeric_limits<T>::max();
      }
      rows[a].diagonal[at] = h[a][a];
    }
    for (int a = 0; a < K; ++a) {
      for (int j = a + 1; j < K; ++j) {
        const T beside = std::abs(h[a][a]) + std::abs(h[j][j]);
        const T scale = std::abs(h[a][j]) + std::abs(h[j][a]) + beside;
        fine &= std::abs(h[a][j] - h[j][a]) <= slack * scale;
      }
    }
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
    if (!products[i].is_contiguous() || products[i].numel() != size) {
      refuse(item_of("products", i), ": expected ", size, " contiguous elements, got shape ", shape_of(products[i]));
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
        rows[a].of_product[c] = static_cast<const T*>(products[c * widths.size() + i].const_data_ptr()) + column;
      }
      rows[a].diagonal = static_cast<T*>(diagonals[i].mutable_data_ptr()) + column;
      rows[a].stride = widths[i];
    }
  }
  const int64_t blocks = shifts.size(0);
  const auto* shift = static_cast<const uint8_t*>(shifts.const_data_ptr());
  const T* factors = static_cast<const T*>(scales.const_data_ptr());
  std::atomic<bool> agree{true};
  const bool apart = std::all_of(widths.begin(), widths.end(), [](int64_t width) { return width == 1; });
  const auto read = apart ? read_blocks<T, K, 1> : read_blocks<T, K, 0>;
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    if (!read(rows, shift, factors, blocks, begin, end, slack)) {
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
