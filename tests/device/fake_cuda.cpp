// Two devices "cuda" for a build of PyTorch without CUDA: in host memory, by the kernels of the CPU.
//
// What is real: CUDA's rules on mixing devices, the current device, a generator for each device, PyTorch's autograd
// threads (one for each device), and a record of what has the CPU wait. What isn't: streams, graphs, cuDNN, speed.
// fake_cuda.py builds it, and loads it before torch, which asks once which devices there are.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/col_indices_native.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/crow_indices_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/values_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

#include "on_host.h"

namespace fake_cuda {
namespace {

constexpr int kDevices = 2;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  at::DeviceType type() const override { return kDevice; }
  Device getDevice() const override { return current_device(); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.is_cuda() && d.index() >= 0 && d.index() < kDevices, "no such device: ", d);
    current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  Device exchangeDevice(Device d) const override {
    Device before = current_device();
    setDevice(d);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n > 0 ? std::malloc(n) : nullptr;
    if (p != nullptr) std::memset(p, 0x7f, n);  // what reads memory that nobody wrote shows
    return {p, p, &std::free, current_device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

// The CPU's generator, said to be a device's.
struct Generator final : c10::GeneratorImpl {
  c10::intrusive_ptr<at::CPUGeneratorImpl> inner;
  Generator(c10::DeviceIndex i, c10::intrusive_ptr<at::CPUGeneratorImpl> given)
      : GeneratorImpl(Device(kDevice, i), c10::DispatchKeySet(c10::DispatchKey::CUDA)), inner(std::move(given)) {}
  void set_current_seed(uint64_t s) override { inner->set_current_seed(s); }
  uint64_t current_seed() const override { return inner->current_seed(); }
  uint64_t seed() override { return inner->seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& s) override { inner->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner->get_state(); }
  Generator* clone_impl() const override {
    auto copy = c10::make_intrusive<at::CPUGeneratorImpl>();
    copy->set_state(*inner->get_state());
    return new Generator(device_.index(), copy);
  }
};

at::Generator new_generator(c10::DeviceIndex i) {
  return at::make_generator<Generator>(i < 0 ? current : i, c10::make_intrusive<at::CPUGeneratorImpl>());
}

const at::Generator& default_generator(c10::DeviceIndex i) {
  static const std::vector<at::Generator> all = {new_generator(0), new_generator(1)};
  return all.at(i < 0 ? current : i);
}

// Torch looks for this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex d) const override { current = d; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    auto before = current;
    if (d >= 0) current = d;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return default_generator(i); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override { return new_generator(i); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

using Callback = void (*)(const char*);
Callback callback = nullptr;

Device placed(std::optional<Device> device) {
  Device d = device.value_or(Device(kDevice));
  return d.has_index() ? d : current_device();
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(placed(device));
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &memory(), keys, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(placed(device));
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &memory(), keys, at::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

// What shares the storage of its input needs no alias; the fallback would take it for new memory.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("native_dropout", &native_dropout);
  m.impl("resize_", &resize_);
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
}

TORCH_LIBRARY_IMPL(aten, SparseCsrCUDA, m) {
  m.impl("values", TORCH_FN(at::native::values_sparse_csr));
  m.impl("crow_indices", TORCH_FN(at::native::crow_indices_sparse_csr));
  m.impl("col_indices", TORCH_FN(at::native::col_indices_sparse_csr));
  m.impl("_nnz", TORCH_FN(at::native::_nnz_sparse_csr));
  m.impl("sparse_dim", TORCH_FN(at::native::sparse_dim_sparse_csr));
  m.impl("dense_dim", TORCH_FN(at::native::dense_dim_sparse_csr));
  m.impl("copy_", TORCH_FN(at::native::copy_sparse_compressed_));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, SparseCsrCUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// What torch.cuda asks the parts of torch that a build without CUDA lacks.
TORCH_LIBRARY(fake_cuda, m) {
  m.def("current_device() -> int", []() -> int64_t { return current; });
  m.def("exchange_device(int i) -> int", [](int64_t i) -> int64_t {
    int64_t before = current;
    if (i >= 0) current = static_cast<c10::DeviceIndex>(i);
    return before;
  });
  m.def("get_state(int i) -> Tensor", [](int64_t i) { return default_generator(i).get_state(); });
  m.def("set_state(int i, Tensor state) -> ()", [](int64_t i, const Tensor& state) {
    at::Generator generator = default_generator(i);
    generator.set_state(state);
  });
  m.def("seed(int i, int seed) -> ()", [](int64_t i, int64_t seed) {
    at::Generator generator = default_generator(i);
    generator.set_current_seed(seed);
  });
}

}  // namespace

c10::Allocator& memory() {
  static Memory all;
  return all;
}

Device current_device() { return Device(kDevice, current); }

void waits(const std::string& what) {
  if (callback != nullptr) callback(what.c_str());
}

at::Generator on_cpu(const c10::IValue& given, Device device) {
  at::Generator generator = given.isNone() ? default_generator(device.index()) : given.toGenerator();
  TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
              generator.device(), "'");
  return at::Generator(static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner);
}

}  // namespace fake_cuda

extern "C" void fake_cuda_tell(fake_cuda::Callback callback) { fake_cuda::callback = callback; }
