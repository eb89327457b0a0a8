// encode: tokens [T, D] -> rows [R, D] as a scatter: each token is read once and written to its k rows.
#include "rows.cuh"

// Moves bytes of any type. Each of the first T groups copies one token. The other groups zero empty rows, and look at
// one row with each of their threads.
template <class Chunk, int K>
__global__ void __launch_bounds__(kThreads, 1)
    encode(const Chunk* __restrict__ x, const long long* __restrict__ token, const long long* __restrict__ slot,
           Chunk* __restrict__ rows, long long num_tokens, long long num_rows, int chunks, int k) {
  const long long t = group_number();
  if (t >= num_tokens) return zero_empty_rows(token, rows, t - num_tokens, num_rows, chunks);
  const Slots<K> slots(slot + t * k, k);
  for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
    const Chunk chunk = row_of(x, t, chunks)[c];
#pragma unroll
    for (int j = 0; j < slots.size(); j++)
      if (slots[j] >= 0) row_of(rows, slots[j], chunks)[c] = chunk;
  }
}
