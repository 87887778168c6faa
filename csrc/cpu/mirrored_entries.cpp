// Entries of symmetric blocks from products that have each entry beside the diagonal twice, and whether both agree.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 14;

int64_t check_products(const std::vector<Tensor>& products) {
  if (products.empty()) {
    refuse("products: expected at least one, got none");
  }
  const ScalarType dtype = products[0].scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse("products[0]: expected float32 or float64, got ", dtype);
  }
  int64_t total = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    check_like(item_of("products", i), products[i], "products[0]", products[0]);
    if (!products[i].is_contiguous()) {
      refuse(item_of("products", i), ": expected a contiguous tensor, got shape ", shape_of(products[i]));
    }
    total += products[i].numel();
  }
  return total;
}

void check_positions(const char* name, const Tensor& x, int64_t size, int64_t below, const Tensor& like) {
  check_integers(name, x, size, like);
  if (x.scalar_type() != like.scalar_type() || !x.is_contiguous()) {
    refuse(name, ": expected a contiguous vector of the dtype of places, ", like.scalar_type());
  }
  check_values(name, x, 0, below);
}

int64_t check_widths(const std::vector<int64_t>& widths) {
  int64_t total = 0;
  for (size_t i = 0; i < widths.size(); ++i) {
    if (widths[i] < 0 || widths[i] > std::numeric_limits<int32_t>::max()) {
      refuse(item_of("widths", i), ": expected 0 to ", std::numeric_limits<int32_t>::max(), ", got ", widths[i]);
    }
    total += widths[i];
  }
  return total;
}

template <typename T>
std::unique_ptr<T[]> joined(const std::vector<Tensor>& products, int64_t total) {
  std::unique_ptr<T[]> all(new T[total]);
  T* next = all.get();
  for (const Tensor& product : products) {
    if (product.numel() > 0) {
      std::memcpy(next, product.const_data_ptr(), product.numel() * sizeof(T));
      next += product.numel();
    }
  }
  return all;
}

// Scaled entries; whether all are finite.
template <typename T, typename Index>
bool read_entries(T* out, const T* all, const Index* places, const T* scales, int64_t count) {
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    bool fine = true;
    for (int64_t e = begin; e < end; ++e) {
      out[e] = scales[e] * all[places[e]];
      fine &= std::abs(out[e]) <= std::numeric_limits<T>::max();
    }
    if (!fine) {
      finite = false;
    }
  });
  return finite;
}

// Whether entries above the diagonals are those below, up to a part of these and of the diagonal beside them.
template <typename T, typename Index>
bool are_mirrored(
    const T* diagonal, const T* above, const T* below, const Index* rows, const Index* columns, int64_t count,
    T slack) {
  std::atomic<bool> agree{true};
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    bool fine = true;
    for (int64_t e = begin; e < end; ++e) {
      const T beside = std::abs(diagonal[rows[e]]) + std::abs(diagonal[columns[e]]);
      const T scale = std::abs(above[e]) + std::abs(below[e]) + beside;
      fine &= std::abs(above[e] - below[e]) <= slack * scale;
    }
    if (!fine) {
      agree = false;
    }
  });
  return agree;
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> mirrored_entries_cpu(
    const std::vector<Tensor>& products, const Tensor& places, const Tensor& scales, const Tensor& rows,
    const Tensor& columns, const std::vector<int64_t>& widths, double slack) {
  const int64_t total = check_products(products);
  const int64_t pairs = rows.numel();
  const int64_t on_it = check_widths(widths);
  const int64_t count = on_it + 2 * pairs;
  check_positions("places", places, count, total, places);
  check_positions("rows", rows, pairs, on_it, places);
  check_positions("columns", columns, pairs, on_it, places);
  check_like("scales", scales, "products[0]", products[0]);
  if (scales.dim() != 1 || scales.size(0) != count || !scales.is_contiguous()) {
    refuse("scales: expected a contiguous vector of shape (", count, "), got ", shape_of(scales));
  }
  std::vector<Tensor> parts;
  Tensor agree = torch::stable::empty({}, ScalarType::Bool);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const std::unique_ptr<T[]> all = joined<T>(products, total);
    const std::unique_ptr<T[]> found(new T[count]);
    const T* factors = static_cast<const T*>(scales.const_data_ptr());
    with_index(places, [&](auto* null) {
      using Index = decltype(null);
      T* out = found.get();
      const bool finite =
          read_entries(out, all.get(), static_cast<Index>(places.const_data_ptr()), factors, count);
      *static_cast<bool*>(agree.mutable_data_ptr()) =
          finite && are_mirrored(
                        out, out + on_it, out + on_it + pairs, static_cast<Index>(rows.const_data_ptr()),
                        static_cast<Index>(columns.const_data_ptr()), pairs, static_cast<T>(slack));
    });
    const T* next = found.get();
    const auto add = [&](int64_t width) {
      parts.push_back(torch::stable::empty({width}, products[0].scalar_type()));
      if (width > 0) {
        std::memcpy(parts.back().mutable_data_ptr(), next, width * sizeof(T));
      }
      next += width;
    };
    std::for_each(widths.begin(), widths.end(), add);
    add(pairs);
    add(pairs);
  };
  if (products[0].scalar_type() == ScalarType::Float) {
    run(0.0F);
  } else {
    run(0.0);
  }
  return {parts, agree};
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("mirrored_entries", TORCH_BOX(&torchzygote::mirrored_entries_cpu));
}
