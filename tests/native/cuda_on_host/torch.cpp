// What a torch without CUDA doesn't have, or has for other devices: the guard of a device and its stream, and a namespace
// beside the real one, in which the CUDA kernels are those for tensors on the CPU.

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

namespace {

constexpr const char* kNamespace = "torchzygote_cuda_on_host";

}  // namespace

extern "C" {

AOTITorchError cuda_on_host_library_init_def(const char*, const char* file, uint32_t line, TorchLibraryHandle* made) {
  return aoti_torch_library_init_def(kNamespace, file, line, made);
}

AOTITorchError cuda_on_host_library_init_fragment(
    const char*, const char* file, uint32_t line, TorchLibraryHandle* made) {
  return aoti_torch_library_init_fragment(kNamespace, file, line, made);
}

AOTITorchError cuda_on_host_library_init_impl(
    const char*, const char*, const char* file, uint32_t line, TorchLibraryHandle* made) {
  return aoti_torch_library_init_impl(kNamespace, "CPU", file, line, made);
}

// A guard is where the device is kept that was current before.
AOTITorchError cuda_on_host_create_device_guard(int32_t index, DeviceGuardHandle* made) {
  *made = reinterpret_cast<DeviceGuardHandle>(new int32_t(cuda_on_host::device));
  cuda_on_host::device = index;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError cuda_on_host_delete_device_guard(DeviceGuardHandle guard) {
  auto* before = reinterpret_cast<int32_t*>(guard);
  cuda_on_host::device = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError cuda_on_host_get_current_cuda_stream(int32_t index, void** found) {
  *found = cuda_on_host::stream_of(index);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
