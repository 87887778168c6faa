// Chunks of products into the rows of their matrices, several arguments in one launch.

#include "../strided.h"
#include "launch.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/complex.h>

namespace torchzygote {
namespace {

constexpr int kBatch = 16;  // arguments of one launch: what fits into a kernel's parameters

struct Argument {
  void* to;
  const void* from;
  int64_t to_row, to_column, from_row, rows, columns;
  RowShape shape;
  ScalarType from_type;
};

struct Batch {
  Argument arguments[kBatch];
};

// Where element `column` of a row lies, relative to the row.
__device__ inline int64_t offset_of(const RowShape& shape, int64_t column) {
  int64_t offset = 0;
  for (int d = shape.dims - 1; d > 0; --d) {
    offset += column % shape.size[d] * shape.stride[d];
    column /= shape.size[d];
  }
  return offset + column * shape.stride[0];
}

template <typename T>
__global__ void move_bits(const __grid_constant__ Batch batch) {
  const Argument& a = batch.arguments[blockIdx.z];
  T* to = static_cast<T*>(a.to);
  const T* from = static_cast<const T*>(a.from);
  for (int64_t i = first_element(); i < a.columns; i += element_step()) {
    const int64_t offset = offset_of(a.shape, i);
    for (int64_t r = first_row(); r < a.rows; r += row_step()) {
      to[r * a.to_row + i * a.to_column] = from[r * a.from_row + offset];
    }
  }
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using ComplexFloat = torch::headeronly::complex<float>;
using ComplexDouble = torch::headeronly::complex<double>;

struct Number {
  double real, imaginary;
};

// Every dtype by way of double: it holds all of them exactly.
__device__ inline Number read(const void* from, int64_t i, ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return {static_cast<double>(static_cast<float>(static_cast<const Half*>(from)[i])), 0};
    case ScalarType::BFloat16:
      return {static_cast<double>(static_cast<float>(static_cast<const BFloat16*>(from)[i])), 0};
    case ScalarType::Float:
      return {static_cast<double>(static_cast<const float*>(from)[i]), 0};
    case ScalarType::Double:
      return {static_cast<const double*>(from)[i], 0};
    case ScalarType::ComplexFloat: {
      const float* pair = static_cast<const float*>(from) + 2 * i;
      return {static_cast<double>(pair[0]), static_cast<double>(pair[1])};
    }
    default: {
      const double* pair = static_cast<const double*>(from) + 2 * i;
      return {pair[0], pair[1]};
    }
  }
}

__device__ inline void write(Half* to, Number x) {
  *to = static_cast<Half>(static_cast<float>(x.real));
}
__device__ inline void write(BFloat16* to, Number x) {
  *to = static_cast<BFloat16>(static_cast<float>(x.real));
}
__device__ inline void write(float* to, Number x) {
  *to = static_cast<float>(x.real);
}
__device__ inline void write(double* to, Number x) {
  *to = x.real;
}
__device__ inline void write(ComplexFloat* to, Number x) {
  *to = ComplexFloat(static_cast<float>(x.real), static_cast<float>(x.imaginary));
}
__device__ inline void write(ComplexDouble* to, Number x) {
  *to = ComplexDouble(x.real, x.imaginary);
}

template <typename T>
__global__ void move_converted(const __grid_constant__ Batch batch) {
  const Argument& a = batch.arguments[blockIdx.z];
  T* to = static_cast<T*>(a.to);
  for (int64_t i = first_element(); i < a.columns; i += element_step()) {
    const int64_t offset = offset_of(a.shape, i);
    for (int64_t r = first_row(); r < a.rows; r += row_step()) {
      write(to + r * a.to_row + i * a.to_column, read(a.from, r * a.from_row + offset, a.from_type));
    }
  }
}

using Kernel = void (*)(const Batch);

Kernel moving(size_t element_size) {
  Kernel found = nullptr;
  with_bits(element_size, [&](auto zero) { found = &move_bits<decltype(zero)>; });
  return found;
}

bool convertible(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double || type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
}

Kernel converting(ScalarType to) {
  switch (to) {
    case ScalarType::Half:
      return &move_converted<Half>;
    case ScalarType::BFloat16:
      return &move_converted<BFloat16>;
    case ScalarType::Float:
      return &move_converted<float>;
    case ScalarType::Double:
      return &move_converted<double>;
    case ScalarType::ComplexFloat:
      return &move_converted<ComplexFloat>;
    default:
      return &move_converted<ComplexDouble>;
  }
}

// Arguments that one kernel serves, launched as soon as they are as many as fit.
class Launches {
 public:
  explicit Launches(const OnDevice& device) : device_(device) {}

  void add(Kernel kernel, const Argument& argument) {
    size_t which = 0;
    while (which < pending_.size() && pending_[which].kernel != kernel) {
      ++which;
    }
    if (which == pending_.size()) {
      pending_.push_back({kernel, 0, {}});
    }
    Pending& pending = pending_[which];
    pending.batch.arguments[pending.count++] = argument;
    if (pending.count == kBatch) {
      run(&pending);
    }
  }

  void finish() {
    for (Pending& pending : pending_) {
      run(&pending);
    }
  }

 private:
  struct Pending {
    Kernel kernel;
    int count;
    Batch batch;
  };

  void run(Pending* pending) const {
    int64_t rows = 0;
    int64_t columns = 0;
    for (int i = 0; i < pending->count; ++i) {
      rows = std::max(rows, pending->batch.arguments[i].rows);
      columns = std::max(columns, pending->batch.arguments[i].columns);
    }
    launch_rows("scatter_rows_", pending->kernel, rows, columns, pending->count, device_, pending->batch);
    pending->count = 0;
  }

  const OnDevice& device_;
  std::vector<Pending> pending_;
};

void check_conversions(const std::vector<Tensor>& blocks, const std::vector<Tensor>& products) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!same_device(blocks[i], blocks[0])) {
      refuse(item_of("blocks", i), ": expected one device, ", device_of(blocks[0]), ", got ", device_of(blocks[i]));
    }
    if (products[i].scalar_type() != blocks[i].scalar_type() &&
        !(convertible(products[i].scalar_type()) && convertible(blocks[i].scalar_type()))) {
      refuse(
          item_of("products", i), ": expected a dtype that converts to ", blocks[i].scalar_type(), ", got ",
          products[i].scalar_type());
    }
  }
}

}  // namespace

void scatter_rows_cuda(const std::vector<Tensor>& blocks, const std::vector<Tensor>& products, int64_t lo) {
  check_scatter_rows(blocks, products, lo);
  if (blocks.empty()) {
    return;
  }
  check_conversions(blocks, products);
  const OnDevice device(blocks[0]);
  Launches launches(device);
  std::vector<Tensor> copies;  // of what lies in too many pieces, until the launches
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (products[i].numel() == 0) {
      continue;
    }
    const Tensor& block = blocks[i];
    Tensor product = products[i];
    Argument argument{};
    if (!collapse_rows(product, &argument.shape)) {
      product = torch::stable::contiguous(product);
      collapse_rows(product, &argument.shape);
      copies.push_back(product);
    }
    argument.to_row = block.stride(0);
    argument.to_column = block.stride(1);
    argument.to = static_cast<char*>(block.mutable_data_ptr()) +
                  lo * argument.to_row * static_cast<int64_t>(block.element_size());
    argument.from = product.const_data_ptr();
    argument.from_row = product.stride(0);
    argument.rows = product.size(0);
    argument.columns = block.size(1);
    argument.from_type = product.scalar_type();
    const bool same = product.scalar_type() == block.scalar_type();
    launches.add(same ? moving(block.element_size()) : converting(block.scalar_type()), argument);
  }
  launches.finish();
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CUDA, m) {
  m.impl("scatter_rows_", TORCH_BOX(&torchzygote::scatter_rows_cuda));
}
