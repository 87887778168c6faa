// What a vertex knows of colors: those that it may not have, and those among its neighbors.

#pragma once

#include "../common.h"

#include <algorithm>
#include <vector>

namespace torchzygote {

// Rows longer than this keep sets of bits, so that the work grows with their entries, not with the squares.
constexpr int64_t kLongRow = 64;

inline void set_bit(std::vector<uint64_t>* words, int64_t position) {
  const size_t word = static_cast<size_t>(position) / 64;
  if (words->size() <= word) {
    words->resize(word + 1, 0);
  }
  (*words)[word] |= uint64_t{1} << (position % 64);
}

// Colors that one vertex may not have, and the smallest it may.
class Forbidden {
 public:
  explicit Forbidden(int64_t vertices) : last_(static_cast<size_t>(vertices) + 1, -1) {}

  void start(int64_t vertex) {
    vertex_ = vertex;
    std::fill(words_.begin(), words_.end(), 0);
  }
  void add(int64_t color) {
    last_[color] = vertex_;
  }
  void add(const std::vector<uint64_t>& colors) {
    if (words_.size() < colors.size()) {
      words_.resize(colors.size(), 0);
    }
    for (size_t i = 0; i < colors.size(); ++i) {
      words_[i] |= colors[i];
    }
  }
  bool contains(int64_t color) const {
    const size_t word = static_cast<size_t>(color) / 64;
    return last_[color] == vertex_ || (word < words_.size() && (words_[word] >> (color % 64) & 1) != 0);
  }
  int64_t smallest() const {
    int64_t color = 0;
    while (contains(color)) {
      ++color;
    }
    return color;
  }

 private:
  std::vector<int64_t> last_;  // the vertex that each color was last forbidden to
  std::vector<uint64_t> words_;
  int64_t vertex_ = -1;
};

// A color among a vertex's neighbors.
struct Near {
  int32_t color;
  int32_t first;        // the first neighbor that has it
  bool twice = false;   // another one has it as well
  bool closed = false;  // one of them has another neighbor of the vertex's own color
};

// The colors among the neighbors of every vertex: a list each, and for long rows a table beside it. Tables have
// colors up to a multiple of the row's entries, so that memory stays linear in all entries.
class NearColors {
 public:
  NearColors(const int64_t* ptr, int64_t vertices)
      : start_(ptr, ptr + vertices + 1),
        used_(static_cast<size_t>(vertices), 0),
        list_(static_cast<size_t>(ptr[vertices])),
        any_closed_(static_cast<size_t>(vertices), 0),
        table_of_(static_cast<size_t>(vertices), -1) {
    for (int64_t v = 0; v < vertices; ++v) {
      if (ptr[v + 1] - ptr[v] > kLongRow) {
        table_of_[v] = static_cast<int32_t>(tables_.size());
        tables_.emplace_back();
        tables_.back().limit = kReach * (ptr[v + 1] - ptr[v]);
      }
    }
  }

  Near* begin(int64_t v) {
    return list_.data() + start_[v];
  }
  Near* end(int64_t v) {
    return begin(v) + used_[v];
  }

  Near* find(int64_t v, int64_t color) {
    if (table_of_[v] >= 0) {
      const Table& table = tables_[table_of_[v]];
      if (color < table.limit) {
        const int32_t at = color < static_cast<int64_t>(table.position.size()) ? table.position[color] : 0;
        return at > 0 ? begin(v) + at - 1 : end(v);
      }
    }
    Near* const last = end(v);
    return std::find_if(begin(v), last, [color](const Near& near) { return near.color == color; });
  }

  void add(int64_t v, int64_t color, int64_t first) {
    if (start_[v] + used_[v] == start_[v + 1]) {
      refuse_at(v);
    }
    *end(v) = Near{static_cast<int32_t>(color), static_cast<int32_t>(first)};
    ++used_[v];
    if (table_of_[v] < 0) {
      return;
    }
    Table& table = tables_[table_of_[v]];
    if (color >= table.limit) {
      table.complete = false;
      return;
    }
    if (color >= static_cast<int64_t>(table.position.size())) {
      table.position.resize(static_cast<size_t>(color) + 1, 0);
    }
    table.position[color] = static_cast<int32_t>(used_[v]);
    set_bit(&table.near, color);
  }

  void close(int64_t v, Near* near) {
    if (near == end(v)) {
      refuse_at(v);
    }
    near->closed = true;
    any_closed_[v] = 1;
    if (table_of_[v] >= 0 && near->color < tables_[table_of_[v]].limit) {
      set_bit(&tables_[table_of_[v]].closed, near->color);
    }
  }

  // All colors near a vertex, or only those that are closed.
  void forbid(int64_t v, bool all, Forbidden* forbidden) {
    if (!all && any_closed_[v] == 0) {
      return;
    }
    if (table_of_[v] >= 0 && tables_[table_of_[v]].complete) {
      const Table& table = tables_[table_of_[v]];
      forbidden->add(all ? table.near : table.closed);
      return;
    }
    for (const Near* x = begin(v); x != end(v); ++x) {
      if (all || x->closed) {
        forbidden->add(x->color);
      }
    }
  }

 private:
  static constexpr int64_t kReach = 8;  // colors that a table has, as a multiple of the row's entries

  struct Table {
    std::vector<int32_t> position;  // of each color in the list, from 1 on; 0 for none
    std::vector<uint64_t> near, closed;
    int64_t limit = 0;
    bool complete = true;  // no color beyond the limit
  };

  static void refuse_at(int64_t v) {
    refuse("indices: expected a symmetric pattern, got one that is not, at row ", v);
  }

  std::vector<int64_t> start_, used_;
  std::vector<Near> list_;
  std::vector<uint8_t> any_closed_;
  std::vector<int32_t> table_of_;
  std::vector<Table> tables_;
};

}  // namespace torchzygote
