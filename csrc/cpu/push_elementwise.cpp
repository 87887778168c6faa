// Tangents through a function of each element, and its curvature along them, in one pass over memory.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements
constexpr int kLanes = 8;            // sums that run side by side, so that compilers vectorize them

template <typename T>
struct Push {
  T* tangents;
  const T* slope;
  const T* weight;
  T* terms;
  int64_t samples;
  int64_t within;  // elements of a sample
};

// One sample along one direction; the tangents are written over.
template <typename T, bool kSquared>
T push_sample(T* __restrict__ tangents, const T* __restrict__ slope, const T* __restrict__ weight, int64_t count) {
  T sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const T tangent = tangents[i + lane];
      const T pushed = tangent * slope[i + lane];
      tangents[i + lane] = pushed;
      sums[lane] += tangent * weight[i + lane] * (kSquared ? tangent : pushed);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    const T tangent = tangents[i];
    const T pushed = tangent * slope[i];
    tangents[i] = pushed;
    sums[i - whole] += tangent * weight[i] * (kSquared ? tangent : pushed);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return sums[0];
}

template <typename T, bool kSquared>
void push_all(const Push<T>& given, int64_t directions) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, given.within));
  torch::stable::parallel_for(0, directions * given.samples, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t of_sample = at % given.samples * given.within;
      given.terms[at] = push_sample<T, kSquared>(
          given.tangents + at * given.within, given.slope + of_sample, given.weight + of_sample, given.within);
    }
  });
}

void check_factor(const char* name, const Tensor& x, const Tensor& tangents) {
  check_like(name, x, "tangents", tangents);
  if (x.dim() != 2 || x.size(0) != tangents.size(1) || x.size(1) != tangents.size(2) || !x.is_contiguous()) {
    refuse(
        name, ": expected a contiguous tensor of shape (", tangents.size(1), ", ", tangents.size(2), "), got shape ",
        shape_of(x));
  }
  const auto* begin = static_cast<const char*>(x.const_data_ptr());
  const auto* written = static_cast<const char*>(tangents.const_data_ptr());
  const auto bytes = [](const Tensor& y) { return y.numel() * static_cast<int64_t>(y.element_size()); };
  if (x.numel() > 0 && begin < written + bytes(tangents) && written < begin + bytes(x)) {
    refuse(name, ": expected other memory than that of tangents, which is written to");
  }
}

}  // namespace

Tensor push_elementwise_cpu(Tensor tangents, const Tensor& slope, const Tensor& weight, bool squared) {
  const ScalarType dtype = tangents.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse("tangents: expected float32 or float64, got ", dtype);
  }
  if (tangents.dim() != 3 || !tangents.is_contiguous()) {
    refuse(
        "tangents: expected a contiguous tensor of shape (directions, samples, elements), got shape ",
        shape_of(tangents));
  }
  check_factor("slope", slope, tangents);
  check_factor("weight", weight, tangents);
  Tensor terms = torch::stable::empty({tangents.size(0), tangents.size(1)}, dtype);
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    const Push<T> given{
        static_cast<T*>(tangents.mutable_data_ptr()),
        static_cast<const T*>(slope.const_data_ptr()),
        static_cast<const T*>(weight.const_data_ptr()),
        static_cast<T*>(terms.mutable_data_ptr()),
        tangents.size(1),
        tangents.size(2)};
    (squared ? push_all<T, true> : push_all<T, false>)(given, tangents.size(0));
  };
  if (dtype == ScalarType::Float) {
    with(0.0F);
  } else {
    with(0.0);
  }
  return terms;
}

}  // namespace torchzygote

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CPU, m) {
  m.impl("push_elementwise_", TORCH_BOX(&torchzygote::push_elementwise_cpu));
}
