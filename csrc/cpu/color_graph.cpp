// Greedy colorings of large sparse graphs: each vertex in turn takes the smallest color that the definition leaves
// it, so that the result is that of torchzygote/coloring/greedy.py. Memory is linear in the entries.

#include "../checks.h"
#include "vertex_colors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

namespace torchzygote {
namespace {

// Row by row, where each row begins; the columns of its entries.
template <typename T>
struct Graph {
  const int64_t* ptr;
  const T* columns;
  int64_t rows;

  int64_t degree(int64_t row) const {
    return ptr[row + 1] - ptr[row];
  }
};

// Vertices by descending weight, equal ones in their natural order.
std::vector<int64_t> sequence(int64_t vertices, bool largest_first, const std::vector<int64_t>& weights) {
  std::vector<int64_t> order(static_cast<size_t>(vertices));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (largest_first) {
    std::stable_sort(
        order.begin(), order.end(), [&](int64_t v, int64_t w) { return weights[v] > weights[w]; });
  }
  return order;
}

template <typename T>
std::vector<int64_t> degrees(const Graph<T>& graph) {
  std::vector<int64_t> found(static_cast<size_t>(graph.rows), 0);
  for (int64_t v = 0; v < graph.rows; ++v) {
    for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
      found[v] += graph.columns[e] != v;
    }
  }
  return found;
}

template <typename T>
void color_neighbors(const Graph<T>& graph, bool largest_first, int64_t* colors) {
  Forbidden forbidden(graph.rows);
  for (const int64_t v : sequence(graph.rows, largest_first, largest_first ? degrees(graph) : std::vector<int64_t>())) {
    forbidden.start(v);
    for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
      const int64_t w = graph.columns[e];
      if (w != v && colors[w] >= 0) {
        forbidden.add(colors[w]);
      }
    }
    colors[v] = forbidden.smallest();
  }
}

// The colors that members of each group have so far: a list, as long as the group; a set of bits where the group
// is long.
class GroupColors {
 public:
  explicit GroupColors(std::vector<int64_t> sizes) : start_(sizes.size() + 1, 0), used_(sizes.size(), 0) {
    bits_.resize(sizes.size());
    for (size_t g = 0; g < sizes.size(); ++g) {
      start_[g + 1] = start_[g] + (sizes[g] > kLong ? 0 : sizes[g]);
    }
    list_.resize(static_cast<size_t>(start_.back()));
    sizes_ = std::move(sizes);
  }

  int64_t size(int64_t group) const {
    return sizes_[group];
  }

  void forbid(int64_t group, Forbidden* forbidden) const {
    if (sizes_[group] > kLong) {
      forbidden->add(bits_[group]);
      return;
    }
    const int64_t* first = list_.data() + start_[group];
    for (int64_t i = 0; i < used_[group]; ++i) {
      forbidden->add(first[i]);
    }
  }

  void add(int64_t group, int64_t color) {
    if (sizes_[group] > kLong) {
      set_bit(&bits_[group], color);
      return;
    }
    list_[start_[group] + used_[group]++] = color;
  }

 private:
  static constexpr int64_t kLong = 256;
  std::vector<int64_t> sizes_, start_, used_, list_;
  std::vector<std::vector<uint64_t>> bits_;
};

// Members of one group get different colors; graph: the groups of each vertex.
template <typename T>
void color_members(const Graph<T>& graph, int64_t groups, bool largest_first, int64_t* colors) {
  std::vector<int64_t> sizes(static_cast<size_t>(groups), 0);
  for (int64_t e = 0; e < graph.ptr[graph.rows]; ++e) {
    ++sizes[graph.columns[e]];
  }
  std::vector<int64_t> weights;
  if (largest_first) {
    weights.assign(static_cast<size_t>(graph.rows), 0);
    for (int64_t v = 0; v < graph.rows; ++v) {
      for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
        weights[v] += sizes[graph.columns[e]] - 1;
      }
    }
  }
  GroupColors taken(std::move(sizes));
  Forbidden forbidden(graph.rows);
  for (const int64_t v : sequence(graph.rows, largest_first, weights)) {
    forbidden.start(v);
    for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
      taken.forbid(graph.columns[e], &forbidden);
    }
    const int64_t color = forbidden.smallest();
    colors[v] = color;
    for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
      taken.add(graph.columns[e], color);
    }
  }
}

// Neighbors differ, and no path of four vertices has two colors only. The next neighbor of a vertex may have none of
// the colors that are closed there, nor, where it lies between two of one color, any that is near those two.
template <typename T>
void color_stars(const Graph<T>& graph, bool largest_first, int64_t* colors) {
  Forbidden forbidden(graph.rows);
  Forbidden repeated(graph.rows);
  NearColors near(graph.ptr, graph.rows);
  for (const int64_t v : sequence(graph.rows, largest_first, largest_first ? degrees(graph) : std::vector<int64_t>())) {
    forbidden.start(v);
    repeated.start(v);
    for (const Near* x = near.begin(v); x != near.end(v); ++x) {
      forbidden.add(x->color);
      if (x->twice) {
        repeated.add(x->color);
      }
    }
    for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
      const int64_t w = graph.columns[e];
      if (w == v || colors[w] < 0) {
        continue;
      }
      near.forbid(w, repeated.contains(colors[w]), &forbidden);
    }
    const int64_t color = forbidden.smallest();
    colors[v] = color;
    for (int64_t e = graph.ptr[v]; e < graph.ptr[v + 1]; ++e) {
      const int64_t w = graph.columns[e];
      if (w == v) {
        continue;
      }
      const int64_t its = colors[w];
      Near* found = near.find(w, color);
      const bool known = found != near.end(w);
      if (!known) {
        near.add(w, color, v);
        found = near.find(w, color);
      }
      if (its >= 0 && repeated.contains(its)) {
        near.close(w, found);
      }
      if (!known) {
        continue;
      }
      if (!found->twice) {
        found->twice = true;
        if (its >= 0) {
          near.close(found->first, near.find(found->first, its));
        }
      }
      if (its >= 0) {
        near.close(v, near.find(v, its));
      }
    }
  }
}

// For each column the rows that it has entries in.
template <typename T>
void transpose(const Graph<T>& graph, int64_t columns, std::vector<int64_t>* ptr, std::vector<T>* rows) {
  const int64_t entries = graph.ptr[graph.rows];
  ptr->assign(static_cast<size_t>(columns) + 1, 0);
  for (int64_t e = 0; e < entries; ++e) {
    ++(*ptr)[graph.columns[e] + 1];
  }
  std::partial_sum(ptr->begin(), ptr->end(), ptr->begin());
  rows->resize(static_cast<size_t>(entries));
  std::vector<int64_t> next(ptr->begin(), ptr->end() - 1);
  for (int64_t i = 0; i < graph.rows; ++i) {
    for (int64_t e = graph.ptr[i]; e < graph.ptr[i + 1]; ++e) {
      (*rows)[next[graph.columns[e]]++] = static_cast<T>(i);
    }
  }
}

void check_graph(
    const Tensor& indptr, const Tensor& indices, int64_t ncols, const std::string& kind, const std::string& order) {
  if (kind != "distance1" && kind != "distance2_rows" && kind != "distance2_columns" && kind != "star") {
    refuse("kind: expected one of 'distance1', 'distance2_rows', 'distance2_columns', 'star', got '", kind, "'");
  }
  if (order != "natural" && order != "largest_first") {
    refuse("order: expected one of 'natural', 'largest_first', got '", order, "'");
  }
  if (indptr.scalar_type() != ScalarType::Long || indptr.dim() != 1 || !indptr.is_contiguous() || indptr.size(0) < 1) {
    refuse("indptr: expected a contiguous int64 vector of one element or more, got shape ", shape_of(indptr));
  }
  check_integers("indices", indices, indices.numel(), indptr);
  if (!indices.is_contiguous()) {
    refuse("indices: expected contiguous memory");
  }
  const int64_t rows = indptr.size(0) - 1;
  if (std::max(rows, ncols) >= std::numeric_limits<int32_t>::max()) {
    refuse("ncols: expected less than 2**31 rows and columns, got ", std::max(rows, ncols));
  }
  if (ncols < 0) {
    refuse("ncols: expected at least 0, got ", ncols);
  }
  if ((kind == "distance1" || kind == "star") && rows != ncols) {
    refuse("ncols: expected a square pattern for '", kind, "', ", rows, ", got ", ncols);
  }
  const int64_t* ptr = static_cast<const int64_t*>(indptr.const_data_ptr());
  bool ascending = ptr[0] == 0 && ptr[rows] == indices.size(0);
  for (int64_t i = 0; i < rows; ++i) {
    ascending &= ptr[i] <= ptr[i + 1];
  }
  if (!ascending) {
    refuse("indptr: expected ascending values from 0 to ", indices.size(0), ", got others");
  }
  check_values("indices", indices, 0, ncols);
}

template <typename T>
Tensor color_typed(
    const Tensor& indptr, const Tensor& indices, int64_t ncols, const std::string& kind, bool largest_first) {
  const Graph<T> graph{
      static_cast<const int64_t*>(indptr.const_data_ptr()), static_cast<const T*>(indices.const_data_ptr()),
      indptr.size(0) - 1};
  const bool by_columns = kind == "distance2_columns";
  const int64_t vertices = by_columns ? ncols : graph.rows;
  Tensor result = torch::stable::empty({vertices}, ScalarType::Long);
  int64_t* colors = static_cast<int64_t*>(result.mutable_data_ptr());
  std::fill(colors, colors + vertices, int64_t{-1});
  if (kind == "distance1") {
    color_neighbors(graph, largest_first, colors);
  } else if (kind == "star") {
    color_stars(graph, largest_first, colors);
  } else if (by_columns) {
    std::vector<int64_t> ptr;
    std::vector<T> rows;
    transpose(graph, ncols, &ptr, &rows);
    color_members(Graph<T>{ptr.data(), rows.data(), ncols}, graph.rows, largest_first, colors);
  } else {
    color_members(graph, ncols, largest_first, colors);
  }
  return result;
}

}  // namespace

Tensor color_graph_cpu(
    const Tensor& indptr, const Tensor& indices, int64_t ncols, const std::string& kind, const std::string& order) {
  check_graph(indptr, indices, ncols, kind, order);
  const bool largest_first = order == "largest_first";
  if (indices.scalar_type() == ScalarType::Int) {
    return color_typed<int32_t>(indptr, indices, ncols, kind, largest_first);
  }
  return color_typed<int64_t>(indptr, indices, ncols, kind, largest_first);
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("color_graph", TORCH_BOX(&torchzygote::color_graph_cpu));
}
