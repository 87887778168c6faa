// Sets of ascending members: united, or found to contain each other.

#pragma once

#include "../common.h"

#include <algorithm>
#include <vector>

namespace torchzygote {

constexpr int64_t kFew = 16;  // times as many members from which on they are looked up one by one

template <typename T>
struct Sets {
  const int64_t* ptr;
  const T* members;
  int64_t count;

  int64_t size(T set) const {
    return ptr[set + 1] - ptr[set];
  }
  const T* begin(T set) const {
    return members + ptr[set];
  }
  const T* end(T set) const {
    return members + ptr[set + 1];
  }
};

// Members of many sets, ascending, each once.
template <typename T>
void unite_many(const Sets<T>& sets, const T* ids, int64_t count, std::vector<T>* all) {
  all->clear();
  bool ascending = true;
  for (int64_t k = 0; k < count; ++k) {
    const T* from = sets.begin(ids[k]);
    const T* to = sets.end(ids[k]);
    ascending = ascending && (from == to || all->empty() || all->back() < *from);
    all->insert(all->end(), from, to);
  }
  if (!ascending) {
    std::sort(all->begin(), all->end());
    all->erase(std::unique(all->begin(), all->end()), all->end());
  }
}

// All members of two sets, ascending; returns the end.
template <typename T>
T* unite_two(const T* a, const T* a_end, const T* b, const T* b_end, T* out) {
  while (a != a_end && b != b_end) {
    const T x = *a;
    const T y = *b;
    *out++ = x < y ? x : y;
    a += x <= y;
    b += y <= x;
  }
  out = std::copy(a, a_end, out);
  return std::copy(b, b_end, out);
}

// Whether all members of a set are among those of another, which has many times as many.
template <typename T>
bool is_part(const T* a, const T* a_end, const T* b, const T* b_end) {
  for (; a != a_end; ++a) {
    b = std::lower_bound(b, b_end, *a);
    if (b == b_end || *b != *a) {
      return false;
    }
  }
  return true;
}

// Whether the largest of some sets contains the others, asked where that is less work than a union.
template <typename T>
bool contains_others(const Sets<T>& sets, const T* ids, int64_t count, T largest, int64_t others) {
  if (others * kFew > sets.size(largest)) {
    return false;
  }
  for (int64_t k = 0; k < count; ++k) {
    const T id = ids[k];
    if (id != largest && !is_part(sets.begin(id), sets.end(id), sets.begin(largest), sets.end(largest))) {
      return false;
    }
  }
  return true;
}

}  // namespace torchzygote
