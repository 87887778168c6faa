// Chunks of products into the rows of their matrices, all arguments in one parallel loop.

#include "../checks.h"
#include "../strided.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/complex.h>

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace torchzygote {
namespace {

constexpr int64_t kTile = 1 << 14;   // elements that one tile moves, about
constexpr int64_t kSquare = 32;      // rows and columns that are transposed at a time

template <typename To, typename From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_constructible_v<To, From>) {
    return static_cast<To>(value);
  } else {  // complex from a 16-bit float
    return To(static_cast<float>(value));
  }
}

// How elements of one type go to another; strides in elements of each side.
struct Mover {
  // a run of one row
  void (*run)(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count);
  // rows that lie next to one another, elements of each apart: kSquare of both at most
  void (*square)(
      char* to, int64_t to_row, int64_t to_column, const char* from, int64_t from_stride, int64_t rows,
      int64_t columns);
};

#if defined(__x86_64__) && defined(__GNUC__)
// 16-bit floats by the processor's own conversion, eight at a time, where it has one. Returns how many were moved.
__attribute__((target("avx,f16c"))) int64_t widen(float* out, const uint16_t* in, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t narrow(uint16_t* out, const float* in, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  return i;
}

template <typename To, typename From>
int64_t move_by_processor([[maybe_unused]] To* out, [[maybe_unused]] const From* in, [[maybe_unused]] int64_t count) {
  [[maybe_unused]] static const bool able = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, torch::headeronly::Half>) {
    return able ? widen(out, reinterpret_cast<const uint16_t*>(in), count) : 0;
  } else if constexpr (std::is_same_v<To, torch::headeronly::Half> && std::is_same_v<From, float>) {
    return able ? narrow(reinterpret_cast<uint16_t*>(out), in, count) : 0;
  } else {
    return 0;
  }
}
#else
template <typename To, typename From>
int64_t move_by_processor(To*, const From*, int64_t) {
  return 0;
}
#endif

template <typename To, typename From>
void move_run(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count) {
  To* out = reinterpret_cast<To*>(to);
  const From* in = reinterpret_cast<const From*>(from);
  if (to_stride != 1) {
    for (int64_t i = 0; i < count; ++i) {
      out[i * to_stride] = convert<To>(in[i * from_stride]);
    }
  } else if (from_stride != 1) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = convert<To>(in[i * from_stride]);
    }
  } else if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = move_by_processor(out, in, count); i < count; ++i) {
      out[i] = convert<To>(in[i]);
    }
  }
}

// By way of a buffer: memory is read and written in runs, whatever the strides.
template <typename To, typename From>
void move_square(
    char* to, int64_t to_row, int64_t to_column, const char* from, int64_t from_stride, int64_t rows,
    int64_t columns) {
  To* out = reinterpret_cast<To*>(to);
  const From* in = reinterpret_cast<const From*>(from);
  To buffer[kSquare][kSquare + 1];
  if (rows == kSquare && columns == kSquare) {
    for (int64_t c = 0; c < kSquare; ++c) {
      for (int64_t r = 0; r < kSquare; ++r) {
        buffer[r][c] = convert<To>(in[c * from_stride + r]);
      }
    }
  } else {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        buffer[r][c] = convert<To>(in[c * from_stride + r]);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    To* row = out + r * to_row;
    if (to_column == 1) {
      std::copy(buffer[r], buffer[r] + columns, row);
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        row[c * to_column] = buffer[r][c];
      }
    }
  }
}

template <typename To, typename From>
constexpr Mover kMover{&move_run<To, From>, &move_square<To, From>};

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using ComplexFloat = torch::headeronly::complex<float>;
using ComplexDouble = torch::headeronly::complex<double>;

template <typename To>
const Mover* conversion_to(ScalarType from) {
  constexpr bool complex_result = std::is_same_v<To, ComplexFloat> || std::is_same_v<To, ComplexDouble>;
  switch (from) {
    case ScalarType::Half:
      return &kMover<To, Half>;
    case ScalarType::BFloat16:
      return &kMover<To, BFloat16>;
    case ScalarType::Float:
      return &kMover<To, float>;
    case ScalarType::Double:
      return &kMover<To, double>;
    case ScalarType::ComplexFloat:
      if constexpr (complex_result) {
        return &kMover<To, ComplexFloat>;
      }
      return nullptr;
    case ScalarType::ComplexDouble:
      if constexpr (complex_result) {
        return &kMover<To, ComplexDouble>;
      }
      return nullptr;
    default:
      return nullptr;
  }
}

const Mover* conversion(ScalarType to, ScalarType from) {
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
  const Mover* mover;
  int64_t tile_rows, tile_columns, tiles_across, first_tile;
  Tensor keep;  // a copy made where the memory lies in too many pieces

  void choose_tiles() {
    tile_rows = transposed() ? std::min(rows, kSquare) : std::max<int64_t>(1, std::min(rows, kTile / columns));
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
      mover->run(to_at(row0, 0), 1, from + row0 * from_row * from_size, 1, (row1 - row0) * columns);
      return;
    }
    const int inner = shape.dims - 1;
    const int64_t length = shape.size[inner];
    for (int64_t column = column0; column < column1;) {
      int64_t rest = column / length;
      const int64_t within = column - rest * length;
      int64_t offset = within * shape.stride[inner];
      for (int d = inner - 1; d >= 0; --d) {
        offset += rest % shape.size[d] * shape.stride[d];
        rest /= shape.size[d];
      }
      const int64_t count = std::min(length - within, column1 - column);
      move(row0, row1, column, count, from + offset * from_size);
      column += count;
    }
  }

 private:
  // Rows lie next to each other in memory, not the elements of a row.
  bool transposed() const {
    return from_row == 1 && rows > 1 && shape.stride[shape.dims - 1] != 1;
  }

  char* to_at(int64_t row, int64_t column) const {
    return to + (row * to_row + column * to_column) * to_size;
  }

  // Columns that are one run of the innermost dimension; source: where the first one of row 0 is.
  void move(int64_t row0, int64_t row1, int64_t column, int64_t count, const char* source) const {
    const int64_t stride = shape.stride[shape.dims - 1];
    if (transposed()) {
      for (int64_t c = 0; c < count; c += kSquare) {
        mover->square(
            to_at(row0, column + c), to_row, to_column, source + (row0 + c * stride) * from_size, stride, row1 - row0,
            std::min(kSquare, count - c));
      }
      return;
    }
    for (int64_t r = row0; r < row1; ++r) {
      mover->run(to_at(r, column), to_column, source + r * from_row * from_size, stride, count);
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
    with_bits(argument.to_size, [&](auto bits) { argument.mover = &kMover<decltype(bits), decltype(bits)>; });
  } else {
    argument.mover = conversion(block.scalar_type(), product.scalar_type());
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
