// Kernels that are wrong, and launches that a GPU refuses: what cuda_runtime.h here must show (test_cuda_on_host.py).

#include "cuda/launch.cuh"

#include <torch/csrc/stable/library.h>

namespace torchzygote {
namespace {

// All threads write to one place.
__global__ void write_number(int64_t* out) {
  *out = first_element();
}

// Each thread reads what the next one writes.
__global__ void read_next(int64_t* out, int64_t count) {
  const int64_t i = first_element();
  out[i] = i + 1 < count ? out[i + 1] + 1 : 0;
}

// How many threads there were for each element.
__global__ void count_visits(int64_t* out, int64_t rows, int64_t columns) {
  for (int64_t r = first_row(); r < rows; r += row_step()) {
    for (int64_t i = first_element(); i < columns; i += element_step()) {
      ++out[r * columns + i];
    }
  }
}

int64_t* data(const Tensor& x) {
  return static_cast<int64_t*>(x.mutable_data_ptr());
}

void probe_one_place(const Tensor& out, int64_t across, int64_t down, int64_t deep, int64_t threads) {
  const OnDevice device(out);
  start("probe", &write_number, dim3(across, down, deep), dim3(threads), device, data(out));
}

void probe_neighbors(const Tensor& out) {
  const OnDevice device(out);
  start("probe", &read_next, dim3(1), dim3(out.size(0)), device, data(out), out.size(0));
}

void probe_visits(const Tensor& out) {
  const OnDevice device(out);
  launch_rows("probe", &count_visits, out.size(0), out.size(1), 1, device, data(out), out.size(0), out.size(1));
}

// The stream of one device, while another one is current: without a guard, none is.
void probe_stream(const Tensor& out, bool guarded) {
  const cudaStream_t stream = OnDevice(out).stream();
  if (guarded) {
    const torch::stable::accelerator::DeviceGuard guard(1);
    cuda_on_host::launch(&write_number, dim3(1), dim3(1), stream, data(out));
  } else {
    cuda_on_host::launch(&write_number, dim3(1), dim3(1), stream, data(out));
  }
  check_cuda(cudaGetLastError(), "probe");
}

}  // namespace
}  // namespace torchzygote

STABLE_TORCH_LIBRARY_FRAGMENT(torchzygote, m) {
  m.def("probe_one_place(Tensor(a!) out, int across, int down, int deep, int threads) -> ()");
  m.def("probe_neighbors(Tensor(a!) out) -> ()");
  m.def("probe_visits(Tensor(a!) out) -> ()");
  m.def("probe_stream(Tensor(a!) out, bool guarded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchzygote, CUDA, m) {
  m.impl("probe_one_place", TORCH_BOX(&torchzygote::probe_one_place));
  m.impl("probe_neighbors", TORCH_BOX(&torchzygote::probe_neighbors));
  m.impl("probe_visits", TORCH_BOX(&torchzygote::probe_visits));
  m.impl("probe_stream", TORCH_BOX(&torchzygote::probe_stream));
}
