// Rows in chunks: a thread moves one chunk at a time, 16 bytes (uint4), or one element if rows are not aligned.
//
// A group of blockDim.x threads shares a token, and a block has blockDim.y groups. Offsets are 64 bits wide.
#pragma once
#include "common.cuh"

constexpr int kThreads = 256;  // most threads of a block; with this in __launch_bounds__ alone, ptxas spills

// Number of this group in the grid.
__device__ __forceinline__ long long group_number() {
  return blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y;
}

// Row r of a matrix with `chunks` chunks in each row.
template <class Chunk>
__device__ __forceinline__ Chunk* row_of(Chunk* matrix, long long r, int chunks) {
  return matrix + r * chunks;
}

// The N elements of type T in a chunk, as floats.
template <class T, class Chunk>
struct Elements {
  static constexpr int N = sizeof(Chunk) / sizeof(T);
  float value[N];

  __device__ static Elements zero() {
    Elements e;
#pragma unroll
    for (int i = 0; i < N; i++) e.value[i] = 0;
    return e;
  }
  __device__ static Elements of(const Chunk chunk) {  // by value, so that it is loaded whole, not element by element
    T raw[N];
    memcpy(raw, &chunk, sizeof chunk);
    Elements e;
#pragma unroll
    for (int i = 0; i < N; i++) e.value[i] = to_float(raw[i]);
    return e;
  }
  __device__ Chunk chunk() const {
    T raw[N];
#pragma unroll
    for (int i = 0; i < N; i++) raw[i] = from_float<T>(value[i]);
    Chunk chunk;
    memcpy(&chunk, raw, sizeof chunk);
    return chunk;
  }
};

// The row of each of a token's k assignments, -1 = none. If k is known at compile time (K > 0), they stay in registers.
template <int K>
struct Slots {
  static constexpr int kAtOnce = K;  // rows that are loaded at the same time
  long long row[K];
  __device__ Slots(const long long* slot, int) {
#pragma unroll
    for (int j = 0; j < K; j++) row[j] = slot[j];
  }
  __device__ long long operator[](int j) const { return row[j]; }
  __device__ int size() const { return K; }
};

template <>
struct Slots<0> {
  static constexpr int kAtOnce = 4;
  const long long* slot;
  int k;
  __device__ Slots(const long long* slot, int k) : slot(slot), k(k) {}
  __device__ long long operator[](int j) const { return j < k ? slot[j] : -1; }
  __device__ int size() const { return k; }
};

// Zeroes the empty rows (token -1) among the group's rows, one row for each of its threads. Tokens write the others.
// A warp looks at 32 rows at once, because one after the other would take 32 memory latencies.
template <class Chunk>
__device__ void zero_empty_rows(const long long* token, Chunk* rows, long long group, long long num_rows, int chunks) {
  const int lane = threadIdx.x % 32;
  const long long first = group * blockDim.x + threadIdx.x - lane;
  unsigned empty = __ballot_sync(~0u, first + lane < num_rows && token[first + lane] < 0);
  for (; empty; empty &= empty - 1) {
    Chunk* row = row_of(rows, first + __ffs(empty) - 1, chunks);
    for (int c = lane; c < chunks; c += 32) row[c] = Chunk{};
  }
}
