// A batch of products as rows: however its memory lies, in as few dimensions as that takes.

#pragma once

#include "common.h"

namespace torchzygote {

constexpr int kMaxDims = 5;

// One row of products: its elements in order, each dimension with a size and a stride, the last one innermost.
struct RowShape {
  int dims = 1;
  int64_t size[kMaxDims] = {0};
  int64_t stride[kMaxDims] = {1};
};

// Dimensions after the first, those that lie behind one another merged. Returns false where more than kMaxDims remain.
inline bool collapse_rows(const Tensor& product, RowShape* shape) {
  int dims = 0;
  for (int64_t d = 1; d < product.dim(); ++d) {
    const int64_t size = product.size(d);
    const int64_t stride = product.stride(d);
    if (size == 1) {
      continue;
    }
    if (dims > 0 && shape->stride[dims - 1] == stride * size) {
      shape->size[dims - 1] *= size;
      shape->stride[dims - 1] = stride;
      continue;
    }
    if (dims == kMaxDims) {
      return false;
    }
    shape->size[dims] = size;
    shape->stride[dims] = stride;
    ++dims;
  }
  if (dims == 0) {  // one element a row
    shape->size[0] = 1;
    shape->stride[0] = 1;
    dims = 1;
  }
  shape->dims = dims;
  return true;
}

}  // namespace torchzygote
