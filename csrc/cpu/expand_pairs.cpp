// Couplings of index sets as a symmetric pattern: entries are counted by row, filled in, then sorted and made unique
// within each row.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace torchzygote {
namespace {

constexpr int64_t kRows = 1 << 12;  // rows that a thread sorts at a time

// Members of a set that lie in one diagonal block.
template <typename T>
struct Span {
  const T* begin;
  const T* end;

  int64_t size() const {
    return end - begin;
  }
};

template <typename T>
struct Couplings {
  const int64_t* ptr;
  const T* members;
  const int64_t* a;
  const int64_t* b;
  int64_t count;
  const int64_t* bounds;
  int64_t blocks;

  Span<T> all(int64_t set) const {
    return {members + ptr[set], members + ptr[set + 1]};
  }

  // Calls f with the two spans of each coupling, block by block, and whether both are one and the same set.
  template <typename F>
  void each(const F& f) const {
    for (int64_t k = 0; k < count; ++k) {
      Span<T> first = all(a[k]);
      Span<T> second = all(b[k]);
      const bool same = a[k] == b[k];
      if (blocks == 1) {
        f(first, second, same);
        continue;
      }
      for (int64_t c = 0; c < blocks && first.size() > 0 && second.size() > 0; ++c) {
        const T limit = static_cast<T>(bounds[c + 1]);
        const T* middle = std::lower_bound(first.begin, first.end, limit);
        const T* other = std::lower_bound(second.begin, second.end, limit);
        f(Span<T>{first.begin, middle}, Span<T>{second.begin, other}, same);
        first.begin = middle;
        second.begin = other;
      }
    }
  }
};

template <typename T>
int64_t total_entries(const Couplings<T>& couplings, int64_t most) {
  int64_t total = 0;
  for (int64_t k = 0; k < couplings.count && total <= most; ++k) {
    const int64_t first = couplings.all(couplings.a[k]).size();
    const int64_t second = couplings.all(couplings.b[k]).size();
    // Dividing instead of multiplying: the product may not fit.
    if (first > 0 && second > (most - total) / first) {
      return most + 1;
    }
    total += first * second;
  }
  return total;
}

// Where each row's entries start, before they are made unique.
template <typename T>
std::vector<int64_t> row_starts(const Couplings<T>& couplings, int64_t size) {
  std::vector<int64_t> starts(size + 1, 0);
  couplings.each([&](Span<T> first, Span<T> second, bool same) {
    for (const T* i = first.begin; i != first.end; ++i) {
      starts[*i + 1] += second.size();
    }
    for (const T* j = second.begin; !same && j != second.end; ++j) {
      starts[*j + 1] += first.size();
    }
  });
  for (int64_t row = 0; row < size; ++row) {
    starts[row + 1] += starts[row];
  }
  return starts;
}

template <typename T>
std::vector<T> row_entries(const Couplings<T>& couplings, const std::vector<int64_t>& starts) {
  std::vector<T> entries(starts.back());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  couplings.each([&](Span<T> first, Span<T> second, bool same) {
    for (const T* i = first.begin; i != first.end; ++i) {
      std::copy(second.begin, second.end, entries.begin() + next[*i]);
      next[*i] += second.size();
    }
    for (const T* j = second.begin; !same && j != second.end; ++j) {
      std::copy(first.begin, first.end, entries.begin() + next[*j]);
      next[*j] += first.size();
    }
  });
  return entries;
}

Tensor new_vector(int64_t size) {
  return torch::stable::empty({size}, ScalarType::Long);
}

template <typename T>
std::tuple<Tensor, Tensor> expand_typed(const Couplings<T>& couplings, int64_t size, int64_t most) {
  if (total_entries(couplings, most) > most) {
    return {new_vector(0), new_vector(0)};
  }
  const std::vector<int64_t> starts = row_starts(couplings, size);
  std::vector<T> entries = row_entries(couplings, starts);
  Tensor indptr = new_vector(size + 1);
  int64_t* bounds = static_cast<int64_t*>(indptr.mutable_data_ptr());
  bounds[0] = 0;
  torch::stable::parallel_for(0, size, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto from = entries.begin() + starts[row];
      const auto to = entries.begin() + starts[row + 1];
      if (!std::is_sorted(from, to)) {
        std::sort(from, to);
      }
      bounds[row + 1] = std::unique(from, to) - from;
    }
  });
  for (int64_t row = 0; row < size; ++row) {
    bounds[row + 1] += bounds[row];
  }
  Tensor indices = new_vector(bounds[size]);
  int64_t* columns = static_cast<int64_t*>(indices.mutable_data_ptr());
  torch::stable::parallel_for(0, size, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto from = entries.begin() + starts[row];
      std::copy(from, from + (bounds[row + 1] - bounds[row]), columns + bounds[row]);
    }
  });
  return {indptr, indices};
}

const int64_t* int64_vector(const std::string& name, const Tensor& x, int64_t least) {
  if (x.scalar_type() != ScalarType::Long) {
    refuse(name, ": expected int64, got ", x.scalar_type());
  }
  if (x.dim() != 1 || !x.is_contiguous()) {
    refuse(name, ": expected a contiguous vector, got shape ", shape_of(x));
  }
  if (x.size(0) < least) {
    refuse(name, ": expected ", least, " elements or more, got ", x.size(0));
  }
  return static_cast<const int64_t*>(x.const_data_ptr());
}

void check_ascending(const std::string& name, const int64_t* values, int64_t count, int64_t last) {
  int64_t before = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (values[k] < before || values[k] > last) {
      refuse(name, ": expected ascending values from 0 to ", last, ", got ", values[k], " after ", before);
    }
    before = values[k];
  }
}

template <typename T>
void check_members(const T* members, int64_t count, int64_t size) {
  for (int64_t k = 0; k < count; ++k) {
    if (members[k] < 0 || static_cast<int64_t>(members[k]) >= size) {
      refuse("set_members: expected values from 0 to ", size - 1, ", got ", static_cast<int64_t>(members[k]));
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> expand_pairs_cpu(
    const Tensor& set_ptr, const Tensor& set_members, const Tensor& first, const Tensor& second,
    const Tensor& bounds, int64_t most) {
  const int64_t* ptr = int64_vector("set_ptr", set_ptr, 1);
  const int64_t* a = int64_vector("first", first, 0);
  const int64_t* b = int64_vector("second", second, 0);
  const int64_t* blocks = int64_vector("bounds", bounds, 2);
  if (second.size(0) != first.size(0)) {
    refuse("second: expected shape ", shape_of(first), ", got ", shape_of(second));
  }
  check_integers("set_members", set_members, set_members.numel(), set_members);
  if (set_members.dim() != 1 || !set_members.is_contiguous()) {
    refuse("set_members: expected a contiguous vector, got shape ", shape_of(set_members));
  }
  const int64_t size = blocks[bounds.size(0) - 1];
  check_ascending("bounds", blocks, bounds.size(0), size);
  if (blocks[0] != 0) {
    refuse("bounds: expected 0 first, got ", blocks[0]);
  }
  check_ascending("set_ptr", ptr, set_ptr.size(0), set_members.size(0));
  check_values("first", first, 0, set_ptr.size(0) - 1);
  check_values("second", second, 0, set_ptr.size(0) - 1);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (size > std::numeric_limits<T>::max()) {
      refuse("bounds: expected at most the largest value that set_members can hold, got ", size);
    }
    const T* members = static_cast<const T*>(set_members.const_data_ptr());
    check_members(members, set_members.size(0), size);
    const Couplings<T> couplings{ptr, members, a, b, first.size(0), blocks, bounds.size(0) - 1};
    return expand_typed(couplings, size, most);
  };
  return set_members.scalar_type() == ScalarType::Int ? run(int32_t{0}) : run(int64_t{0});
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("expand_pairs", TORCH_BOX(&torchzygote::expand_pairs_cpu));
}
