// Couplings of index sets as a symmetric pattern, row by row: what a row is coupled with is read set by set, and
// each column kept once, so that memory is that of the pattern, however often its entries are coupled.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>

namespace torchzygote {
namespace {

constexpr int64_t kRows = 1 << 12;  // rows that a thread expands at a time
constexpr int64_t kReads = 8;       // entries that may be read, as a multiple of those that may be kept

template <typename T>
struct Couplings {
  const int64_t* ptr;
  const T* members;
  const int64_t* a;
  const int64_t* b;
  int64_t count;
  const int64_t* bounds;
  int64_t blocks;

  int64_t size(int64_t set) const {
    return ptr[set + 1] - ptr[set];
  }
};

// How many entries there are to read, or more than `most`.
template <typename T>
int64_t total_entries(const Couplings<T>& couplings, int64_t most) {
  int64_t total = 0;
  for (int64_t k = 0; k < couplings.count && total <= most; ++k) {
    const int64_t first = couplings.size(couplings.a[k]);
    const int64_t second = couplings.size(couplings.b[k]);
    // Dividing instead of multiplying: the product may not fit.
    if (first > 0 && second > (most - total) / first) {
      return most + 1;
    }
    total += first * second;
  }
  return total;
}

// For each row the sets that it is coupled with.
template <typename T>
struct Partners {
  std::vector<int64_t> start;
  std::vector<int64_t> sets;

  // Calls f with the members that get a partner, and that partner.
  template <typename F>
  static void each(const Couplings<T>& couplings, const F& f) {
    for (int64_t k = 0; k < couplings.count; ++k) {
      const int64_t first = couplings.a[k], second = couplings.b[k];
      if (couplings.size(first) == 0 || couplings.size(second) == 0) {
        continue;
      }
      f(first, second);
      if (first != second) {
        f(second, first);
      }
    }
  }

  // False if there are more than `most`.
  bool collect(const Couplings<T>& couplings, int64_t size, int64_t most) {
    int64_t total = 0;
    each(couplings, [&](int64_t set, int64_t) { total += couplings.size(set); });
    if (total > most) {
      return false;
    }
    start.assign(size + 1, 0);
    sets.resize(total);
    each(couplings, [&](int64_t set, int64_t) {
      for (int64_t m = couplings.ptr[set]; m < couplings.ptr[set + 1]; ++m) {
        ++start[couplings.members[m] + 1];
      }
    });
    for (int64_t row = 0; row < size; ++row) {
      start[row + 1] += start[row];
    }
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    each(couplings, [&](int64_t set, int64_t partner) {
      for (int64_t m = couplings.ptr[set]; m < couplings.ptr[set + 1]; ++m) {
        sets[next[couplings.members[m]]++] = partner;
      }
    });
    return true;
  }
};

// The columns of one row after the other, each once and in ascending order.
template <typename T>
class Rows {
 public:
  Rows(const Couplings<T>& couplings, const Partners<T>& partners, int64_t size)
      : couplings_(couplings), partners_(partners), seen_(static_cast<size_t>(size), -1) {}

  // Appends the columns of a row; returns how many.
  int64_t append(int64_t row, std::vector<T>* columns) {
    const size_t before = columns->size();
    const int64_t* bounds = couplings_.bounds;
    const int64_t* block = std::upper_bound(bounds, bounds + couplings_.blocks, row);
    for (int64_t p = partners_.start[row]; p < partners_.start[row + 1]; ++p) {
      const T* from = couplings_.members + couplings_.ptr[partners_.sets[p]];
      const T* to = couplings_.members + couplings_.ptr[partners_.sets[p] + 1];
      if (couplings_.blocks > 1) {
        from = std::lower_bound(from, to, static_cast<T>(block[-1]));
        to = std::lower_bound(from, to, static_cast<T>(block[0]));
      }
      for (; from != to; ++from) {
        if (seen_[*from] != static_cast<T>(row)) {
          seen_[*from] = static_cast<T>(row);
          columns->push_back(*from);
        }
      }
    }
    sort(row, columns->begin() + before, columns->end());
    return static_cast<int64_t>(columns->size() - before);
  }

 private:
  template <typename I>
  void sort(int64_t row, I from, const I to) const {
    if (std::is_sorted(from, to)) {
      return;
    }
    const auto ends = std::minmax_element(from, to);
    const T first = *ends.first, last = *ends.second;
    if (static_cast<int64_t>(last - first) > kSparse * static_cast<int64_t>(to - from)) {
      std::sort(from, to);
      return;
    }
    for (T column = first; column <= last; ++column) {  // as they have been marked
      if (seen_[column] == static_cast<T>(row)) {
        *from++ = column;
      }
    }
  }

  static constexpr int64_t kSparse = 16;  // columns to look at for one that is there, instead of sorting
  const Couplings<T>& couplings_;
  const Partners<T>& partners_;
  std::vector<T> seen_;  // the row that each column was last met in
};

Tensor new_vector(int64_t size) {
  return torch::stable::empty({size}, ScalarType::Long);
}

template <typename T>
std::tuple<Tensor, Tensor> expand_typed(const Couplings<T>& couplings, int64_t size, int64_t most) {
  const int64_t reads = most > std::numeric_limits<int64_t>::max() / kReads - 1 ? most : kReads * most;
  Partners<T> partners;
  if (total_entries(couplings, reads) > reads || !partners.collect(couplings, size, most)) {
    return {new_vector(0), new_vector(0)};
  }
  Tensor indptr = new_vector(size + 1);
  int64_t* bounds = static_cast<int64_t*>(indptr.mutable_data_ptr());
  bounds[0] = 0;
  std::vector<std::vector<T>> parts(static_cast<size_t>((size + kRows - 1) / kRows));
  std::atomic<int64_t> kept{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    Rows<T> rows(couplings, partners, size);
    for (int64_t row = begin * kRows; row < std::min(end * kRows, size) && kept <= most; ++row) {
      bounds[row + 1] = rows.append(row, &parts[row / kRows]);
      kept += bounds[row + 1];
    }
  });
  if (kept > most) {
    return {new_vector(0), new_vector(0)};
  }
  for (int64_t row = 0; row < size; ++row) {
    bounds[row + 1] += bounds[row];
  }
  Tensor indices = new_vector(bounds[size]);
  int64_t* columns = static_cast<int64_t*>(indices.mutable_data_ptr());
  for (const std::vector<T>& part : parts) {
    columns = std::copy(part.begin(), part.end(), columns);
  }
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
