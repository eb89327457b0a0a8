// decode: rows [R, D] -> tokens [T, D], each the sum of its k rows, with or without weights; and the weighted backward.
#include "rows.cuh"

// Blocks per multiprocessor, so that enough loads are under way (README.md). With k = 8, ptxas by itself would leave
// room for two. With three it spills registers in float32, and before sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksOfHalves = 2;
#else
constexpr int kBlocksOfHalves = 3;
#endif

// Sums in float32 over j = 0 .. k - 1. Dropped assignments are skipped. A product and the sum it is added to are
// rounded once (FMA), as in plain PyTorch on a CPU, so both agree bit for bit. dispatch/reorder.py names the one
// exception. `weight` is null if rows are weighted already.
template <class T, class Chunk, int K>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? kBlocksOfHalves : 2)
    decode(const Chunk* __restrict__ rows, const float* __restrict__ weight, const long long* __restrict__ slot,
           Chunk* __restrict__ y, long long num_tokens, int chunks, int k) {
  using Values = Elements<T, Chunk>;
  using Homes = Slots<K>;
  const long long t = group_number();
  if (t >= num_tokens) return;
  const Homes homes(slot + t * k, k);
  for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
    Values sum = Values::zero();
    for (int first = 0; first < homes.size(); first += Homes::kAtOnce) {
      Chunk chunk[Homes::kAtOnce];
#pragma unroll
      for (int i = 0; i < Homes::kAtOnce; i++)  // start all loads before the first sum waits for one
        if (homes[first + i] >= 0) chunk[i] = row_of(rows, homes[first + i], chunks)[c];
#pragma unroll
      for (int i = 0; i < Homes::kAtOnce; i++) {
        if (homes[first + i] < 0) continue;
        const Values row = Values::of(chunk[i]);
        const float w = weight ? weight[t * k + first + i] : 1.0f;
#pragma unroll
        for (int e = 0; e < Values::N; e++) sum.value[e] = fmaf(row.value[e], w, sum.value[e]);
      }
    }
    row_of(y, t, chunks)[c] = sum.chunk();
  }
}

// grad_rows[slot[t, j]] = weight[t, j] * grad[t] and grad_weight[t, j] = <rows[slot[t, j]], grad[t]>, 0 if dropped.
// A group is one warp, and reads grad once for kAtOnce rows. Empty rows get zeros, as in encode.
template <class T, class Chunk, int K>
__global__ void __launch_bounds__(kThreads, 1)
    decode_backward(const Chunk* __restrict__ grad, const Chunk* __restrict__ rows, const float* __restrict__ weight,
                    const long long* __restrict__ token, const long long* __restrict__ slot,
                    Chunk* __restrict__ grad_rows, float* __restrict__ grad_weight, long long num_tokens,
                    long long num_rows, int chunks, int k) {
  using Values = Elements<T, Chunk>;
  using Homes = Slots<K>;
  const long long t = group_number();
  if (t >= num_tokens) return zero_empty_rows(token, grad_rows, t - num_tokens, num_rows, chunks);
  const Homes homes(slot + t * k, k);
  for (int first = 0; first < homes.size(); first += Homes::kAtOnce) {
    float dot[Homes::kAtOnce] = {}, w[Homes::kAtOnce];
#pragma unroll
    for (int i = 0; i < Homes::kAtOnce; i++) w[i] = homes[first + i] >= 0 ? weight[t * k + first + i] : 0;
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
      const Values g = Values::of(row_of(grad, t, chunks)[c]);
      Chunk chunk[Homes::kAtOnce];
#pragma unroll
      for (int i = 0; i < Homes::kAtOnce; i++)
        if (homes[first + i] >= 0) chunk[i] = row_of(rows, homes[first + i], chunks)[c];
#pragma unroll
      for (int i = 0; i < Homes::kAtOnce; i++) {
        if (homes[first + i] < 0) continue;
        const Values row = Values::of(chunk[i]);
        Values product;
#pragma unroll
        for (int e = 0; e < Values::N; e++) {
          dot[i] = fmaf(row.value[e], g.value[e], dot[i]);
          product.value[e] = __fmul_rn(g.value[e], w[i]);
        }
        row_of(grad_rows, homes[first + i], chunks)[c] = product.chunk();
      }
    }
#pragma unroll
    for (int i = 0; i < Homes::kAtOnce; i++) {
      for (int lanes = 16; lanes > 0; lanes /= 2) dot[i] += __shfl_xor_sync(~0u, dot[i], lanes);
      if (threadIdx.x == 0 && first + i < k) grad_weight[t * k + first + i] = dot[i];
    }
  }
}
