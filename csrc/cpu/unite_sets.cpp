// Unions of interned sorted index sets: the id of each group's union, new sets stored once.
//
// Groups are taken in batches: their unions are formed in parallel, then looked up in order in one hash table, so
// that ids don't depend on the number of threads.

#include "../checks.h"
#include "set_tables.h"
#include "set_unions.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>

namespace torchzygote {
namespace {

constexpr int64_t kBatch = 1 << 15;         // groups at a time
constexpr int64_t kBatchMembers = 1 << 22;  // and about as many members in their unions
constexpr int64_t kFirstBatch = 1 << 10;
constexpr int64_t kAhead = 8;               // groups whose place in the table is fetched before it is needed
constexpr int64_t kRemembered = 16;         // members from which on looking for an equal group pays
constexpr int64_t kReadBesides = 1 << 24;   // members that may be read whatever the limit for new ones is

// What one group's union came to: one of its own sets, or members in a thread's buffer.
struct Union {
  int64_t id;     // of an existing set, or -1
  int64_t equal;  // an earlier group of the same sets, or -1
  int64_t chunk, offset, size;
  uint64_t hash;
};

// Memory that grows without being written to.
template <typename T>
class Buffer {
 public:
  void clear() {
    used = 0;
  }
  T* room_for(int64_t more) {
    if (used + more > static_cast<int64_t>(capacity_)) {
      const size_t capacity = std::max<size_t>(capacity_ * 2, static_cast<size_t>(used + more));
      std::unique_ptr<T[]> larger(new T[capacity]);
      std::copy(data(), data() + used, larger.get());
      memory_.swap(larger);
      capacity_ = capacity;
    }
    return memory_.get() + used;
  }
  const T* data() const {
    return memory_.get();
  }

  int64_t used = 0;

 private:
  std::unique_ptr<T[]> memory_;
  size_t capacity_ = 0;
};

// `read` counts the members that were looked at.
template <typename T>
Union unite(
    const Sets<T>& sets, const T* ids, int64_t count, std::vector<T>* all, Buffer<T>* buffer, int64_t* read) {
  Union result{-1, -1, 0, buffer->used, 0, 0};
  if (count == 0) {
    result.id = sets.count > 0 && sets.size(0) == 0 ? 0 : -1;
    return result;
  }
  int64_t largest = 0;
  bool several = false;
  for (int64_t k = 1; k < count; ++k) {
    several = several || (ids[k] != ids[0]);
    if (sets.size(ids[k]) > sets.size(ids[largest])) {
      largest = k;
    }
  }
  if (!several || sets.size(ids[largest]) == 0) {
    result.id = sets.size(ids[0]) == 0 && sets.size(0) == 0 ? 0 : ids[0];
    return result;
  }
  int64_t total = 0;
  int64_t others = 0;
  for (int64_t k = 0; k < count; ++k) {
    total += sets.size(ids[k]);
    others += ids[k] == ids[largest] ? 0 : sets.size(ids[k]);
  }
  *read += others;
  if (contains_others(sets, ids, count, ids[largest], others)) {
    result.id = ids[largest];
    return result;
  }
  *read += total - others;
  const T* start;
  if (count == 2) {
    T* room = buffer->room_for(sets.size(ids[0]) + sets.size(ids[1]));
    T* end = unite_two(sets.begin(ids[0]), sets.end(ids[0]), sets.begin(ids[1]), sets.end(ids[1]), room);
    result.size = end - room;
    start = room;
  } else {
    unite_many(sets, ids, count, all);
    result.size = static_cast<int64_t>(all->size());
    T* room = buffer->room_for(result.size);
    start = room;
    std::copy(all->begin(), all->end(), room);
  }
  if (result.size == sets.size(ids[largest])) {  // contains all others
    result.id = ids[largest];
    return result;
  }
  buffer->used += result.size;
  uint64_t hash = 0;
  for (int64_t i = 0; i < result.size; ++i) {
    hash = mixed(hash + static_cast<uint64_t>(start[i]) + 1);
  }
  result.hash = hash;
  return result;
}

template <typename T>
struct Groups {
  const int64_t* ptr;  // null: groups of two, first[g] and second[g]
  const T* first;
  const T* second;
  int64_t count;
};

// Unions of the groups begin to end, in buffers of their own; returns where that stopped as buffers were full.
template <typename T>
int64_t unite_batch(
    const Sets<T>& sets, const Groups<T>& groups, int64_t begin, int64_t end, std::vector<Union>* unions,
    std::vector<Buffer<T>>* buffers, int64_t* read) {
  const int64_t chunks = std::min<int64_t>(torch::stable::get_num_threads(), (end - begin + 255) / 256);
  buffers->resize(std::max<int64_t>(chunks, 1));
  const int64_t length = (end - begin + chunks - 1) / chunks;
  std::vector<int64_t> reads(buffers->size(), 0);
  std::vector<int64_t> stops(buffers->size(), end);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t c0, int64_t c1) {
    std::vector<T> all;
    for (int64_t c = c0; c < c1; ++c) {
      int64_t looked_at = 0;
      Remembered<T> remembered;
      Buffer<T>& buffer = (*buffers)[c];
      buffer.clear();
      const int64_t last = std::min(end, begin + (c + 1) * length);
      for (int64_t g = begin + c * length; g < last; ++g) {
        if (buffer.used > kBatchMembers) {
          stops[c] = g;
          break;
        }
        Union& united = (*unions)[g - begin];
        T pair[2] = {0, 0};
        const T* ids = pair;
        int64_t count = 2;
        if (groups.ptr == nullptr) {
          pair[0] = groups.first[g];
          pair[1] = groups.second[g];
          if (g + kAhead < last) {
            __builtin_prefetch(sets.ptr + groups.first[g + kAhead]);
            __builtin_prefetch(sets.ptr + groups.second[g + kAhead]);
          }
        } else {
          ids = groups.first + groups.ptr[g];
          count = groups.ptr[g + 1] - groups.ptr[g];
        }
        if (count > kRemembered || (count == 2 && sets.size(ids[0]) + sets.size(ids[1]) > kRemembered)) {
          united.equal = remembered.find(ids, count, g);
          if (united.equal >= 0) {
            continue;
          }
        }
        united = unite(sets, ids, count, &all, &buffer, &looked_at);
        united.chunk = c;
      }
      reads[c] = looked_at;
    }
  });
  *read = std::accumulate(reads.begin(), reads.end(), *read);
  return *std::min_element(stops.begin(), stops.end());
}

// Ids of all groups' unions; false where that takes more than `most` new members, or many times as many read.
template <typename T>
bool unite_all(const Sets<T>& sets, const Groups<T>& groups, int64_t most, T* ids, Interned<T>* found) {
  std::vector<Union> unions;
  std::vector<Buffer<T>> buffers;
  int64_t batch = kFirstBatch;
  int64_t read = 0;
  for (int64_t begin = 0; begin < groups.count;) {
    int64_t end = std::min(groups.count, begin + batch);
    unions.resize(end - begin);
    end = unite_batch(sets, groups, begin, end, &unions, &buffers, &read);
    if ((read - kReadBesides) / 8 > most) {
      return false;
    }
    for (int64_t g = begin; g < end; ++g) {
      if (g + kAhead < end) {
        found->prefetch(unions[g - begin + kAhead].hash);
      }
      const Union& united = unions[g - begin];
      if (united.equal >= 0) {
        ids[g] = ids[united.equal];
        continue;
      }
      if (united.id >= 0) {
        ids[g] = static_cast<T>(united.id);
        continue;
      }
      const T* from = buffers[united.chunk].data() + united.offset;
      ids[g] = static_cast<T>(sets.count + found->find_or_add(from, united.size, united.hash));
      if (static_cast<int64_t>(found->members.size()) > most) {
        return false;
      }
    }
    int64_t load = 0;
    for (const Buffer<T>& buffer : buffers) {
      load += buffer.used;
    }
    batch = std::min(kBatch, std::max(kFirstBatch, kBatchMembers / (load / (end - begin) + 1)));
    begin = end;
  }
  return true;
}

Tensor new_vector(int64_t size, ScalarType dtype) {
  return torch::stable::empty({size}, dtype);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> unite_typed(
    const Tensor& set_ptr, const Tensor& set_members, const Groups<T>& groups, int64_t most, ScalarType dtype) {
  const Sets<T> sets{
      static_cast<const int64_t*>(set_ptr.const_data_ptr()), static_cast<const T*>(set_members.const_data_ptr()),
      set_ptr.size(0) - 1};
  if (sets.count + groups.count > static_cast<int64_t>(std::numeric_limits<T>::max())) {
    refuse("set_members: expected int64 for more than 2**31 sets, old and new, got ", dtype);
  }
  Interned<T> found(std::min<int64_t>(groups.count, 1 << 20));
  Tensor ids = new_vector(groups.count, dtype);
  if (!unite_all(sets, groups, most, static_cast<T*>(ids.mutable_data_ptr()), &found)) {
    return {new_vector(0, dtype), new_vector(0, ScalarType::Long), new_vector(0, dtype)};
  }
  const int64_t added = static_cast<int64_t>(found.ptr.size()) - 1;
  Tensor sizes = new_vector(added, ScalarType::Long);
  int64_t* size = static_cast<int64_t*>(sizes.mutable_data_ptr());
  for (int64_t i = 0; i < added; ++i) {
    size[i] = found.ptr[i + 1] - found.ptr[i];
  }
  Tensor members = new_vector(static_cast<int64_t>(found.members.size()), dtype);
  if (!found.members.empty()) {
    std::memcpy(members.mutable_data_ptr(), found.members.data(), found.members.size() * sizeof(T));
  }
  return {ids, sizes, members};
}

void check_vector(const std::string& name, const Tensor& x) {
  if (x.dim() != 1 || !x.is_contiguous()) {
    refuse(name, ": expected a contiguous vector, got shape ", shape_of(x));
  }
}

// Where the sets begin and end. Whether they do so within the members is checked for those that are used: all
// sets of a long detection are passed again and again.
void check_sets(const Tensor& set_ptr, const Tensor& set_members) {
  check_integers("set_members", set_members, set_members.numel(), set_members);
  check_vector("set_members", set_members);
  check_vector("set_ptr", set_ptr);
  if (set_ptr.scalar_type() != ScalarType::Long) {
    refuse("set_ptr: expected int64, got ", set_ptr.scalar_type());
  }
  if (set_ptr.size(0) < 1) {
    refuse("set_ptr: expected one element or more, got none");
  }
}

template <typename T>
void check_ids(const std::string& name, const Tensor& ids, const Tensor& set_ptr, const Tensor& set_members) {
  if (ids.scalar_type() != set_members.scalar_type()) {
    refuse(name, ": expected the dtype of set_members, ", set_members.scalar_type(), ", got ", ids.scalar_type());
  }
  check_vector(name, ids);
  check_values(name, ids, 0, set_ptr.size(0) - 1);
  const T* id = static_cast<const T*>(ids.const_data_ptr());
  const int64_t* ptr = static_cast<const int64_t*>(set_ptr.const_data_ptr());
  const int64_t last = set_members.size(0);
  if (ids.size(0) > set_ptr.size(0) / 8) {  // all of them, in order, is less work than these
    bool ascending = ptr[0] >= 0 && ptr[set_ptr.size(0) - 1] <= last;
    for (int64_t s = 0; s + 1 < set_ptr.size(0); ++s) {
      ascending &= ptr[s] <= ptr[s + 1];
    }
    if (!ascending) {
      refuse("set_ptr: expected ascending values from 0 to ", last, ", got others");
    }
    return;
  }
  for (int64_t k = 0; k < ids.size(0); ++k) {
    const int64_t begin = ptr[id[k]];
    const int64_t end = ptr[id[k] + 1];
    if (begin < 0 || end < begin || end > last) {
      refuse("set_ptr: expected ascending values from 0 to ", last, ", got ", begin, " before ", end);
    }
  }
}

void check_groups(const Tensor& group_ptr, int64_t last) {
  check_vector("group_ptr", group_ptr);
  if (group_ptr.scalar_type() != ScalarType::Long) {
    refuse("group_ptr: expected int64, got ", group_ptr.scalar_type());
  }
  if (group_ptr.size(0) < 1) {
    refuse("group_ptr: expected one element or more, got none");
  }
  const int64_t* data = static_cast<const int64_t*>(group_ptr.const_data_ptr());
  int64_t before = 0;
  for (int64_t g = 0; g < group_ptr.size(0); ++g) {
    if (data[g] < before || data[g] > last) {
      refuse("group_ptr: expected ascending values from 0 to ", last, ", got ", data[g], " after ", before);
    }
    before = data[g];
  }
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

template <typename F>
Result with_members(const Tensor& set_members, const F& f) {
  if (set_members.scalar_type() == ScalarType::Int) {
    return f(int32_t{0});
  }
  return f(int64_t{0});
}

}  // namespace

Result unite_sets_cpu(
    const Tensor& set_ptr, const Tensor& set_members, const Tensor& group_ptr, const Tensor& group_ids, int64_t most) {
  check_sets(set_ptr, set_members);
  return with_members(set_members, [&](auto zero) {
    using T = decltype(zero);
    check_ids<T>("group_ids", group_ids, set_ptr, set_members);
    check_groups(group_ptr, group_ids.size(0));
    const Groups<T> groups{
        static_cast<const int64_t*>(group_ptr.const_data_ptr()), static_cast<const T*>(group_ids.const_data_ptr()),
        nullptr, group_ptr.size(0) - 1};
    return unite_typed<T>(set_ptr, set_members, groups, most, set_members.scalar_type());
  });
}

Result unite_pairs_cpu(
    const Tensor& set_ptr, const Tensor& set_members, const Tensor& first, const Tensor& second, int64_t most) {
  check_sets(set_ptr, set_members);
  return with_members(set_members, [&](auto zero) {
    using T = decltype(zero);
    check_ids<T>("first", first, set_ptr, set_members);
    check_ids<T>("second", second, set_ptr, set_members);
    if (first.size(0) != second.size(0)) {
      refuse("second: expected shape ", shape_of(first), ", got ", shape_of(second));
    }
    const Groups<T> groups{
        nullptr, static_cast<const T*>(first.const_data_ptr()), static_cast<const T*>(second.const_data_ptr()),
        first.size(0)};
    return unite_typed<T>(set_ptr, set_members, groups, most, set_members.scalar_type());
  });
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("unite_sets", TORCH_BOX(&torchzygote::unite_sets_cpu));
  m.impl("unite_pairs", TORCH_BOX(&torchzygote::unite_pairs_cpu));
}
