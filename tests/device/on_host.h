// Operators on tensors of the "cuda" of fake_cuda.cpp: by the kernels of the CPU, on aliases that share memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace fake_cuda {

using at::Device;
using at::Storage;
using at::Tensor;

constexpr auto kDevice = c10::DeviceType::CUDA;

// Of fake_cuda.cpp.
c10::Allocator& memory();
Device current_device();
// What is told of each operation that has the CPU wait for the device, or copies between the two.
void waits(const std::string& what);
// The CPU's generator that stands for the one given, or for the device's default one.
at::Generator on_cpu(const c10::IValue& generator, Device device);

// Tensors of one call and what stands for them on the CPU. Storages are shared, so that views stay views.
class Aliases {
 public:
  Tensor to_cpu(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    Tensor alias;
    if (t.layout() == at::kStrided) {
      alias = viewed(aliased(t.storage()), t, c10::DispatchKey::CPU);
      if (t.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
      pairs_.emplace_back(alias, t);
    } else {
      TORCH_CHECK(t.layout() == at::kSparseCsr, "fake cuda: no tensors of layout ", t.layout());
      alias = csr(to_cpu(t.crow_indices()), to_cpu(t.col_indices()), to_cpu(t.values()), t, at::kCPU);
    }
    originals_[alias.unsafeGetTensorImpl()] = t;
    return alias;
  }

  Tensor to_device(const Tensor& t, Device device) {
    if (!t.defined() || !t.is_cpu()) return t;
    auto original = originals_.find(t.unsafeGetTensorImpl());
    if (original != originals_.end()) return original->second;
    if (t.layout() == at::kStrided) return viewed(moved(t.storage(), device), t, c10::DispatchKey::CUDA);
    TORCH_CHECK(t.layout() == at::kSparseCsr, "fake cuda: no tensors of layout ", t.layout());
    return csr(to_device(t.crow_indices(), device), to_device(t.col_indices(), device),
               to_device(t.values(), device), t, device);
  }

  // An operator with out= may have given an alias another size, or more memory.
  void adopt_sizes() {
    for (auto& [alias, t] : pairs_) {
      const auto& found = alias.storage();
      if (found.data() != t.storage().data()) {
        c10::DeviceGuard guard(t.device());
        auto copy = memory().allocate(found.nbytes());
        if (found.nbytes() > 0) std::memcpy(copy.get(), found.data(), found.nbytes());
        t.storage().unsafeGetStorageImpl()->set_data_ptr(std::move(copy));
        t.storage().unsafeGetStorageImpl()->set_nbytes(found.nbytes());
      }
      if (alias.sizes() != t.sizes() || alias.strides() != t.strides())
        t.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }

 private:
  static Tensor viewed(const Storage& storage, const Tensor& like, c10::DispatchKey backend) {
    auto keys = c10::DispatchKeySet(backend);
    if (like._is_zerotensor()) keys = keys.add(c10::DispatchKey::ZeroTensor);
    auto impl = c10::make_intrusive<c10::TensorImpl>(Storage(storage), keys, like.dtype());
    impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    Tensor made(std::move(impl));
    made._set_conj(like.is_conj());
    made._set_neg(like.is_neg());
    return made;
  }

  static Tensor csr(const Tensor& rows, const Tensor& columns, const Tensor& values, const Tensor& like,
                    Device device) {
    auto options = values.options().layout(at::kSparseCsr).device(device);
    return at::_sparse_csr_tensor_unsafe(rows, columns, values, like.sizes(), options);
  }

  Storage aliased(const Storage& s) {
    auto& found = cpu_storages_[s.unsafeGetStorageImpl()];
    if (!found) {
      found = Storage(c10::Storage::use_byte_size_t(), s.nbytes(),
                      c10::DataPtr(const_cast<void*>(s.data()), Device(at::kCPU)), at::getCPUAllocator(), true);
      device_storages_[found.unsafeGetStorageImpl()] = s;
    }
    return found;
  }

  // New memory of the CPU's, kept alive by the storage that passes it off as the device's.
  Storage moved(const Storage& s, Device device) {
    auto& found = device_storages_[s.unsafeGetStorageImpl()];
    if (!found) {
      auto* keep = new Storage(s);
      c10::DataPtr data(const_cast<void*>(s.data()), keep, [](void* p) { delete static_cast<Storage*>(p); }, device);
      found = Storage(c10::Storage::use_byte_size_t(), s.nbytes(), std::move(data), &memory(), true);
    }
    return found;
  }

  std::map<c10::StorageImpl*, Storage> cpu_storages_, device_storages_;
  std::map<c10::TensorImpl*, Tensor> originals_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// Below autograd and autocast, which have done their part.
inline c10::impl::ExcludeDispatchKeyGuard kernels_alone() {
  return c10::impl::ExcludeDispatchKeyGuard(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                            c10::autocast_dispatch_keyset);
}

// These ask the device for values or sizes; of aten::index a mask does.
inline const std::set<std::string> kWaits = {
    "aten::nonzero",  "aten::masked_select",       "aten::_unique2",  "aten::_unique",
    "aten::bincount", "aten::unique_consecutive",  "aten::equal",     "aten::unique_dim",
    "aten::is_nonzero", "aten::_local_scalar_dense", "aten::repeat_interleave"};
// These take no number from the CPU among tensors of the device.
inline const std::set<std::string> kStrict = {
    "aten::cat",         "aten::gather",       "aten::scatter",   "aten::scatter_add", "aten::scatter_add_",
    "aten::scatter_",    "aten::index_select", "aten::index_add", "aten::index_add_",  "aten::index_copy",
    "aten::index_copy_", "aten::take",         "aten::put_",      "aten::embedding"};
inline const std::set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::index_put",
                                                "aten::_index_put_impl_", "aten::_unsafe_index"};

// The tensors that a call was given, and on which device it runs.
struct Call {
  struct Given {
    Tensor tensor;
    bool written, index;
  };
  std::string name;
  std::vector<Given> given;
  Device target = Device(at::kCPU);
  bool device_given = false;

  Call(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> values) : name(schema.name()) {
    for (size_t i = 0; i < values.size(); ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      see(values[i], alias != nullptr && alias->isWrite());
    }
    if (!device_given) settle();
    if (target.is_cuda() && !target.has_index()) target = current_device();
  }

  // CUDA's rules: all on one device, but numbers of the CPU's (not written to) and index tensors of the CPU's.
  void check() const {
    if (device_given) return;
    for (const auto& [t, written, index] : given) {
      bool allowed = t.is_cpu() && (index || (t.dim() == 0 && !written && kStrict.count(name) == 0));
      TORCH_CHECK(t.device() == target || t.is_meta() || allowed,
                  "Expected all tensors to be on the same device, but found at least two devices, ", target, " and ",
                  t.device(), "! (", name, ")");
    }
  }

  void tell_waits() const {
    if (kWaits.count(name) != 0) waits(name);
    if (kIndexing.count(name) == 0) return;
    for (const auto& one : given) {
      if (!one.index) continue;
      auto dtype = one.tensor.scalar_type();
      if (one.tensor.is_cuda() && (dtype == at::kBool || dtype == at::kByte)) waits(name + " by a mask");
      if (one.tensor.is_cpu() && one.tensor.numel() > 0) waits(name + ": index to the device");
    }
  }

 private:
  void see(const c10::IValue& v, bool written) {
    if (v.isTensor()) {
      add(v.toTensor(), written, false);
    } else if (v.isTensorList()) {
      for (const Tensor& t : v.toTensorList()) add(t, written, false);
    } else if (v.isOptionalTensorList()) {
      for (std::optional<Tensor> t : v.toOptionalTensorList())
        if (t) add(*t, written, true);
    } else if (v.isDevice()) {
      target = v.toDevice();
      device_given = true;
    }
  }

  void add(const Tensor& t, bool written, bool index) {
    if (t.defined()) given.push_back({t, written, index});
  }

  // That of the first tensor with dimensions, else of the first number, else of an index.
  void settle() {
    for (int rank : {2, 1, 0})
      for (const auto& one : given)
        if (target.is_cpu() && one.tensor.is_cuda() && (one.index ? 0 : one.tensor.dim() > 0 ? 2 : 1) == rank)
          target = one.tensor.device();
  }
};

// Any operator without a kernel of its own below.
inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  size_t count = schema.arguments().size(), first = stack->size() - count;
  Call call(schema, c10::ArrayRef<c10::IValue>(*stack).slice(first));
  call.check();
  call.tell_waits();
  Aliases aliases;
  for (size_t i = 0; i < count; ++i) {
    auto& v = (*stack)[first + i];
    if (v.isTensor()) {
      v = aliases.to_cpu(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorList()) list.push_back(aliases.to_cpu(t));
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : v.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(aliases.to_cpu(*t)) : t);
      v = list;
    } else if (v.isDevice()) {
      v = Device(at::kCPU);
    } else if (schema.arguments()[i].name() == "generator") {
      v = on_cpu(v, call.target);
    }
  }
  {
    auto guard = kernels_alone();
    op.callBoxed(stack);
  }
  aliases.adopt_sizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& v = (*stack)[i];
    if (v.isTensor()) {
      v = aliases.to_device(v.toTensor(), call.target);
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorList()) list.push_back(aliases.to_device(t, call.target));
      v = list;
    }
  }
}

// Draws from the device's generator, which it isn't given.
inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  auto guard = kernels_alone();
  Tensor mask = at::empty_like(input, input.options().dtype(at::kBool));
  if (!train.value_or(true)) return {input.clone(), mask.fill_(true)};
  mask.bernoulli_(1 - p);
  return {input.mul(mask).mul_(p < 1 ? 1 / (1 - p) : 0.0), mask};
}

inline Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (source.is_cuda() && self.is_cpu() && source.numel() > 0) waits("copy from the device");
  if (source.is_cpu() && self.is_cuda() && source.numel() > 0) waits("copy to the device");
  Aliases aliases;
  auto guard = kernels_alone();
  Tensor alias = aliases.to_cpu(self);
  alias.copy_(aliases.to_cpu(source), non_blocking);
  return self;
}

}  // namespace fake_cuda
