// Included before anything else: what the kernels' files ask of torch for CUDA, under names that torch.cpp has.

#pragma once

#define aoti_torch_library_init_def cuda_on_host_library_init_def
#define aoti_torch_library_init_impl cuda_on_host_library_init_impl
#define aoti_torch_create_device_guard cuda_on_host_create_device_guard
#define aoti_torch_delete_device_guard cuda_on_host_delete_device_guard
#define aoti_torch_get_current_cuda_stream cuda_on_host_get_current_cuda_stream
