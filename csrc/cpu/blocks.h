// Blocks of indices that stay in the nearest cache: asked first whether all are in range, then used without asking.

#pragma once

#include "../checks.h"

#include <algorithm>
#include <limits>

namespace torchzygote {

constexpr int64_t kBlock = 1 << 11;

// Whether all of a block lies in lo to lo + rows; data lies side by side.
template <typename Index>
bool all_among(const Index* data, int64_t begin, int64_t end, int64_t lo, int64_t rows) {
  return lo <= std::numeric_limits<Index>::max() - rows && all_within(data, 1, begin, end, lo, lo + rows - 1);
}

// f(first, last) for each block between the two.
template <typename F>
void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (int64_t first = begin; first < end; first += kBlock) {
    f(first, std::min(first + kBlock, end));
  }
}

}  // namespace torchzygote
