// Shared by all kernels: element types and dynamic shared memory.
#pragma once

#ifndef TURNOUT_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Dynamic shared memory as `T name[]`.
#define SHARED_MEMORY(T, name)                                   \
  extern __shared__ __align__(16) unsigned char name##_memory[]; \
  T* const name = reinterpret_cast<T*>(name##_memory)
#endif

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
