// Chunks of products into the rows of their matrices, all arguments in one parallel loop.

#include "../checks.h"
#include "../strided.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/complex.h>

#include <cstring>

namespace torchzygote {
namespace {

constexpr int64_t kTile = 1 << 14;    // elements that one tile moves, about
constexpr int64_t kTransposed = 32;   // rows of a tile whose source is contiguous across rows

// Moves count elements; strides in elements of each side.
using Move = void (*)(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count);

template <typename T>
void move_bits(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, count * sizeof(T));
    return;
  }
  T* out = reinterpret_cast<T*>(to);
  const T* in = reinterpret_cast<const T*>(from);
  if (to_stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = in[i * from_stride];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i * to_stride] = in[i * from_stride];
    }
  }
}

template <typename To, typename From>
To convert(From value) {
  if constexpr (std::is_constructible_v<To, From>) {
    return static_cast<To>(value);
  } else {  // complex from a 16-bit float
    return To(static_cast<float>(value));
  }
}

template <typename To, typename From>
void move_converted(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count) {
  To* out = reinterpret_cast<To*>(to);
  const From* in = reinterpret_cast<const From*>(from);
  if (to_stride == 1 && from_stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = convert<To>(in[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i * to_stride] = convert<To>(in[i * from_stride]);
    }
  }
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using ComplexFloat = torch::headeronly::complex<float>;
using ComplexDouble = torch::headeronly::complex<double>;

template <typename To>
Move conversion_to(ScalarType from) {
  constexpr bool complex_result = std::is_same_v<To, ComplexFloat> || std::is_same_v<To, ComplexDouble>;
  switch (from) {
    case ScalarType::Half:
      return &move_converted<To, Half>;
    case ScalarType::BFloat16:
      return &move_converted<To, BFloat16>;
    case ScalarType::Float:
      return &move_converted<To, float>;
    case ScalarType::Double:
      return &move_converted<To, double>;
    case ScalarType::ComplexFloat:
      if constexpr (complex_result) {
        return &move_converted<To, ComplexFloat>;
      }
      return nullptr;
    case ScalarType::ComplexDouble:
      if constexpr (complex_result) {
        return &move_converted<To, ComplexDouble>;
      }
      return nullptr;
    default:
      return nullptr;
  }
}

Move conversion(ScalarType to, ScalarType from) {
  switch (to) {
    case ScalarType::Half:
      return conversion_to<Half>(from);
    case ScalarType::BFloat16:
      return conversion_to<BFloat16>(from);
    case ScalarType::Float:
      return conversion_to<float>(from);
    case ScalarType::Double:
      return conversion_to<double>(from);
    case ScalarType::ComplexFloat:
      return conversion_to<ComplexFloat>(from);
    case ScalarType::ComplexDouble:
      return conversion_to<ComplexDouble>(from);
    default:
      return nullptr;
  }
}

// One argument: where its rows come from and go to, and how they are cut into tiles.
struct Argument {
  char* to;
  const char* from;
  int64_t to_row, to_column, from_row;
  int64_t to_size, from_size;
  int64_t rows, columns;
  RowShape shape;
  Move move;
  int64_t tile_rows, tile_columns, tiles_across, first_tile;
  Tensor keep;  // a copy made where the memory lies in too many pieces

  void choose_tiles() {
    tile_rows = transposed() ? std::min(rows, kTransposed) : std::max<int64_t>(1, std::min(rows, kTile / columns));
    tile_columns = std::min(columns, std::max<int64_t>(1, kTile / tile_rows));
    tiles_across = (columns + tile_columns - 1) / tile_columns;
  }

  int64_t tiles() const {
    return tiles_across * ((rows + tile_rows - 1) / tile_rows);
  }

  void run(int64_t tile) const {
    const int64_t row0 = tile / tiles_across * tile_rows;
    const int64_t row1 = std::min(rows, row0 + tile_rows);
    const int64_t column0 = tile % tiles_across * tile_columns;
    const int64_t column1 = std::min(columns, column0 + tile_columns);
    const bool whole = column0 == 0 && column1 == columns && to_column == 1 && to_row == columns;
    if (whole && shape.dims == 1 && shape.stride[0] == 1 && from_row == columns) {
      move(to_at(row0, 0), 1, from + row0 * from_row * from_size, 1, (row1 - row0) * columns);
    } else if (transposed()) {
      transpose(row0, row1, column0, column1);
    } else {
      for (int64_t r = row0; r < row1; ++r) {
        move_row(r, column0, column1);
      }
    }
  }

 private:
  // Rows lie next to each other in memory, not the elements of a row.
  bool transposed() const {
    return shape.dims == 1 && from_row == 1 && shape.stride[0] != 1;
  }

  char* to_at(int64_t row, int64_t column) const {
    return to + (row * to_row + column * to_column) * to_size;
  }

  // A few columns at a time, so that what was read stays in the cache.
  void transpose(int64_t row0, int64_t row1, int64_t column0, int64_t column1) const {
    constexpr int64_t kColumns = 32;
    const int64_t stride = shape.stride[0];
    for (int64_t c = column0; c < column1; c += kColumns) {
      const int64_t count = std::min(kColumns, column1 - c);
      for (int64_t r = row0; r < row1; ++r) {
        move(to_at(r, c), to_column, from + (r + c * stride) * from_size, stride, count);
      }
    }
  }

  // A run of the innermost dimension at a time.
  void move_row(int64_t row, int64_t column0, int64_t column1) const {
    const int inner = shape.dims - 1;
    const int64_t length = shape.size[inner];
    int64_t column = column0;
    while (column < column1) {
      int64_t run = column / length;
      const int64_t within = column - run * length;
      int64_t offset = row * from_row + within * shape.stride[inner];
      for (int d = inner - 1; d >= 0; --d) {
        offset += run % shape.size[d] * shape.stride[d];
        run /= shape.size[d];
      }
      const int64_t count = std::min(length - within, column1 - column);
      move(to_at(row, column), to_column, from + offset * from_size, shape.stride[inner], count);
      column += count;
    }
  }
};

Argument prepare(const Tensor& block, const Tensor& product, int64_t lo) {
  Argument argument{};
  argument.to_row = block.stride(0);
  argument.to_column = block.stride(1);
  argument.to_size = static_cast<int64_t>(block.element_size());
  argument.rows = product.size(0);
  argument.columns = block.size(1);
  argument.to = static_cast<char*>(block.mutable_data_ptr()) + lo * argument.to_row * argument.to_size;
  argument.keep = product;
  if (!collapse_rows(argument.keep, &argument.shape)) {
    argument.keep = torch::stable::contiguous(argument.keep);
    collapse_rows(argument.keep, &argument.shape);
  }
  argument.from = static_cast<const char*>(argument.keep.const_data_ptr());
  argument.from_row = argument.keep.stride(0);
  argument.from_size = static_cast<int64_t>(argument.keep.element_size());
  if (product.scalar_type() == block.scalar_type()) {
    with_bits(argument.to_size, [&](auto bits) { argument.move = &move_bits<decltype(bits)>; });
  } else {
    argument.move = conversion(block.scalar_type(), product.scalar_type());
  }
  return argument;
}

void check_conversions(const std::vector<Tensor>& blocks, const std::vector<Tensor>& products) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (products[i].scalar_type() != blocks[i].scalar_type() &&
        conversion(blocks[i].scalar_type(), products[i].scalar_type()) == nullptr) {
      refuse(
          item_of("products", i), ": expected a dtype that converts to ", blocks[i].scalar_type(), ", got ",
          products[i].scalar_type());
    }
  }
}

}  // namespace

void scatter_rows_cpu(const std::vector<Tensor>& blocks, const std::vector<Tensor>& products, int64_t lo) {
  check_scatter_rows(blocks, products, lo);
  check_conversions(blocks, products);
  std::vector<Argument> arguments;
  int64_t tiles = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (products[i].numel() == 0) {
      continue;
    }
    Argument argument = prepare(blocks[i], products[i], lo);
    argument.choose_tiles();
    argument.first_tile = tiles;
    tiles += argument.tiles();
    elements += argument.rows * argument.columns;
    arguments.push_back(std::move(argument));
  }
  if (tiles == 0) {
    return;
  }
  const int64_t grain = std::max<int64_t>(1, 2 * kTile * tiles / elements);
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    size_t which = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (which + 1 < arguments.size() && arguments[which + 1].first_tile <= tile) {
        ++which;
      }
      arguments[which].run(tile - arguments[which].first_tile);
    }
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("scatter_rows_", TORCH_BOX(&torchzygote::scatter_rows_cpu));
}
