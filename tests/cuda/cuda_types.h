// The types of CUDA C++ that kernels use, for g++.
#pragma once
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define VECTOR_TYPES(T, name)                                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                     \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };               \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }             \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_TYPES(int, int)
VECTOR_TYPES(unsigned, uint)
VECTOR_TYPES(float, float)
#undef VECTOR_TYPES

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };

inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};          // nan
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }
