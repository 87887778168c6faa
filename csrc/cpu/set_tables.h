// Hash tables for unions of index sets: new sets by their members, and a thread's last groups by their ids.

#pragma once

#include "../common.h"

#include <algorithm>

namespace torchzygote {

inline uint64_t mixed(uint64_t x) {
  x *= 0x9E3779B97F4A7C15ull;
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9ull;
  return x ^ (x >> 32);
}

// Which of a thread's last groups had the same sets.
template <typename T>
class Remembered {
 public:
  // The earlier group, or -1; this one takes its place.
  int64_t find(const T* ids, int64_t count, int64_t group) {
    uint64_t hash = static_cast<uint64_t>(count);
    for (int64_t k = 0; k < count; ++k) {
      hash = mixed(hash + static_cast<uint64_t>(ids[k]));
    }
    if (entries_.empty()) {
      entries_.resize(kSize);
    }
    Entry& entry = entries_[hash % kSize];
    const bool same = entry.group >= 0 && entry.hash == hash && static_cast<int64_t>(entry.ids.size()) == count &&
                      std::equal(ids, ids + count, entry.ids.begin());
    if (same) {
      return entry.group;
    }
    entry.hash = hash;
    entry.group = group;
    entry.ids.assign(ids, ids + count);
    return -1;
  }

 private:
  static constexpr size_t kSize = 1 << 12;
  struct Entry {
    uint64_t hash = 0;
    int64_t group = -1;
    std::vector<T> ids;
  };
  std::vector<Entry> entries_;
};

// New sets by their members: open addressing, 32 bits of the hash beside the number of the set.
template <typename T>
class Interned {
 public:
  explicit Interned(int64_t expected) {
    size_t capacity = 64;
    while (capacity < static_cast<size_t>(expected) * 2) {
      capacity *= 2;
    }
    slots_.assign(capacity, kFree);
    ptr.push_back(0);
  }

  void prefetch(uint64_t hash) const {
    __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]);
  }

  // Number of the set with these members among the new ones.
  int64_t find_or_add(const T* from, int64_t size, uint64_t hash) {
    const uint64_t tag = hash & ~kNumber;
    size_t place = hash & (slots_.size() - 1);
    for (; slots_[place] != kFree; place = (place + 1) & (slots_.size() - 1)) {
      if ((slots_[place] & ~kNumber) != tag) {
        continue;
      }
      const int64_t number = static_cast<int64_t>(slots_[place] & kNumber);
      if (ptr[number + 1] - ptr[number] == size && std::equal(from, from + size, members.data() + ptr[number])) {
        return number;
      }
    }
    const int64_t number = static_cast<int64_t>(ptr.size()) - 1;
    if (static_cast<uint64_t>(number) >= kNumber) {
      refuse("unite_sets: expected less than ", kNumber, " new sets");
    }
    slots_[place] = tag | static_cast<uint64_t>(number);
    members.insert(members.end(), from, from + size);
    ptr.push_back(static_cast<int64_t>(members.size()));
    hashes_.push_back(hash);
    if (ptr.size() * 2 > slots_.size()) {
      grow();
    }
    return number;
  }

  std::vector<int64_t> ptr;
  std::vector<T> members;

 private:
  static constexpr uint64_t kNumber = 0xFFFFFFFFull;
  static constexpr uint64_t kFree = ~0ull;

  void grow() {
    std::vector<uint64_t> old(slots_.size() * 2, kFree);
    old.swap(slots_);
    for (size_t number = 0; number < hashes_.size(); ++number) {
      size_t place = hashes_[number] & (slots_.size() - 1);
      while (slots_[place] != kFree) {
        place = (place + 1) & (slots_.size() - 1);
      }
      slots_[place] = (hashes_[number] & ~kNumber) | number;
    }
  }

  std::vector<uint64_t> slots_;
  std::vector<uint64_t> hashes_;
};

}  // namespace torchzygote
