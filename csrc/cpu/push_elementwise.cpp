// Tangents through a function of each element, and its curvature along them, in one pass over memory.

#include "../checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

namespace torchzygote {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements
constexpr int kLanes = 8;            // sums that run side by side, so that compilers vectorize them

// Functions whose slope, and whose weight of the curvature, are as soon made of the result z and its cotangent c as read.
struct Given {
  template <typename T>
  static T slope(T slope) {
    return slope;
  }
  template <typename T>
  static T weight(T, T weight) {
    return weight;
  }
};

struct Tanh {
  template <typename T>
  static T slope(T z) {
    return 1 - z * z;
  }
  template <typename T>
  static T weight(T z, T c) {
    return z * c;
  }
};

struct Sigmoid {
  template <typename T>
  static T slope(T z) {
    return z - z * z;
  }
  template <typename T>
  static T weight(T z, T c) {
    return (1 - 2 * z) * c;
  }
};

template <typename T>
struct Push {
  T* tangents;
  const T* slope;
  const T* weight;
  T* terms;
  int64_t samples;
  int64_t within;  // elements of a sample
};

// What becomes of one tangent, which is written over, and its curvature.
template <typename T, typename F, bool kSquared>
T push_one(T& tangent, T slope, T weight) {
  const T before = tangent;
  tangent = before * F::template slope<T>(slope);
  return before * F::template weight<T>(slope, weight) * (kSquared ? before : tangent);
}

// One sample along one direction.
template <typename T, typename F, bool kSquared>
T push_sample(T* __restrict__ tangents, const T* __restrict__ slope, const T* __restrict__ weight, int64_t count) {
  T sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += push_one<T, F, kSquared>(tangents[i + lane], slope[i + lane], weight[i + lane]);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    sums[i - whole] += push_one<T, F, kSquared>(tangents[i], slope[i], weight[i]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return sums[0];
}

// The same for few elements, of which the lanes would take five times as long.
template <typename T, typename F, bool kSquared>
T push_short(T* __restrict__ tangents, const T* __restrict__ slope, const T* __restrict__ weight, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += push_one<T, F, kSquared>(tangents[i], slope[i], weight[i]);
  }
  return sum;
}

template <typename T, typename F, bool kSquared>
void push_all(const Push<T>& given, int64_t directions) {
  const auto push = given.within < kLanes ? push_short<T, F, kSquared> : push_sample<T, F, kSquared>;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, given.within));
  torch::stable::parallel_for(0, directions * given.samples, grain, [&](int64_t begin, int64_t end) {
    int64_t sample = begin % given.samples;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t of_sample = sample * given.within;
      given.terms[at] =
          push(given.tangents + at * given.within, given.slope + of_sample, given.weight + of_sample, given.within);
      sample = sample + 1 == given.samples ? 0 : sample + 1;  // a division takes as long as four elements
    }
  });
}

template <typename T>
void push_through(const Push<T>& given, int64_t directions, bool squared, const std::string& function) {
  if (function == "tanh") {
    push_all<T, Tanh, false>(given, directions);
  } else if (function == "sigmoid") {
    push_all<T, Sigmoid, false>(given, directions);
  } else if (squared) {
    push_all<T, Given, true>(given, directions);
  } else {
    push_all<T, Given, false>(given, directions);
  }
}

void check_function(const std::string& function, bool squared) {
  if (function.empty()) {
    return;
  }
  if (function != "tanh" && function != "sigmoid") {
    refuse("function: expected tanh, sigmoid or nothing, got ", function);
  }
  if (squared) {
    refuse("squared: expected false for ", function, ", got true");
  }
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

Tensor push_elementwise_cpu(
    Tensor tangents, const Tensor& slope, const Tensor& weight, bool squared, std::string function) {
  check_function(function, squared);
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
    push_through<T>(given, tangents.size(0), squared, function);
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
