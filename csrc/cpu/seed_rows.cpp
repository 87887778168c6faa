// Seeds for a chunk of rows or colors: zeros and ones, each element written once.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

template <typename T>
class Block {
 public:
  T* data;
  int64_t row_stride, column_stride;

  Block(T* data, int64_t row_stride, int64_t column_stride)
      : data(data), row_stride(row_stride), column_stride(column_stride) {}

  void zero(int64_t row0, int64_t row1, int64_t column0, int64_t column1) const {
    const int64_t width = column1 - column0;
    if (column_stride == 1 && row_stride == width) {
      zero_run(data + row0 * row_stride, (row1 - row0) * width);
      return;
    }
    for (int64_t r = row0; r < row1; ++r) {
      T* row = data + r * row_stride + column0 * column_stride;
      if (column_stride == 1) {
        zero_run(row, width);
      } else {
        for (int64_t i = 0; i < width; ++i) {
          row[i * column_stride] = T{};
        }
      }
    }
  }

 private:
  // In pieces: a large memset writes past the caches, and the seeds are read next.
  static void zero_run(T* from, int64_t count) {
    constexpr int64_t kPiece = (1 << 16) / sizeof(T);
    for (int64_t i = 0; i < count; i += kPiece) {
      std::memset(static_cast<void*>(from + i), 0, std::min(kPiece, count - i) * sizeof(T));
    }
  }
};

template <typename T>
void seed_diagonal(const Block<T>& block, int64_t rows, int64_t columns, int64_t lo, T one) {
  const auto fill = [&](int64_t row0, int64_t row1, int64_t column0, int64_t column1) {
    block.zero(row0, row1, column0, column1);
    const int64_t first = std::max(row0, column0 - lo);
    const int64_t last = std::min(row1, column1 - lo);
    for (int64_t r = first; r < last; ++r) {
      block.data[r * block.row_stride + (lo + r) * block.column_stride] = one;
    }
  };
  if (rows >= columns || rows >= 64) {
    torch::stable::parallel_for(
        0, rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) { fill(begin, end, 0, columns); });
  } else {
    torch::stable::parallel_for(
        0, columns, kGrain / rows + 1, [&](int64_t begin, int64_t end) { fill(0, rows, begin, end); });
  }
}

template <typename T, typename Index>
void seed_colors(
    const Block<T>& block, int64_t rows, int64_t columns, int64_t lo, T one, const Index* colors, int64_t stride) {
  const auto fill = [&](int64_t row0, int64_t row1, int64_t column0, int64_t column1) {
    block.zero(row0, row1, column0, column1);
    for (int64_t i = column0; i < column1; ++i) {
      const int64_t r = static_cast<int64_t>(colors[i * stride]) - lo;
      if (r >= row0 && r < row1) {
        block.data[r * block.row_stride + i * block.column_stride] = one;
      }
    }
  };
  if (rows >= columns) {
    torch::stable::parallel_for(
        0, rows, kGrain / columns + 1, [&](int64_t begin, int64_t end) { fill(begin, end, 0, columns); });
  } else {
    torch::stable::parallel_for(
        0, columns, kGrain / rows + 1, [&](int64_t begin, int64_t end) { fill(0, rows, begin, end); });
  }
}

}  // namespace

void seed_rows_cpu(const Tensor& out, int64_t lo, const std::optional<Tensor>& colors) {
  check_seed_rows(out, lo, colors);
  const Bits128 one = bits_of_one(out.scalar_type());
  if (out.numel() == 0) {
    return;
  }
  with_bits(out.element_size(), [&](auto zero) {
    using T = decltype(zero);
    const Block<T> block(static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1));
    if (!colors.has_value()) {
      seed_diagonal(block, out.size(0), out.size(1), lo, narrowed<T>(one));
      return;
    }
    with_index(*colors, [&](auto* null) {
      const auto* data = static_cast<decltype(null)>(colors->const_data_ptr());
      seed_colors(block, out.size(0), out.size(1), lo, narrowed<T>(one), data, colors->stride(0));
    });
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("seed_rows_", TORCH_BOX(&torchzygote::seed_rows_cpu));
}
