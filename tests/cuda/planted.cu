// Kernels with a bug planted in each, and their sound twins: what the runner must see. They ship with nobody.

// out[i] = in[n - 1 - i] through shared memory.
template <bool BARRIER>
__global__ void reverse(const int* in, int* out, int n) {
  __shared__ int tile[256];
  tile[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = tile[n - 1 - int(threadIdx.x)];
}

// The same in dynamic shared memory of which the last int may be missing.
__global__ void reverse_dynamic(const int* in, int* out, int n) {
  SHARED_MEMORY(int, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[n - 1 - int(threadIdx.x)];
}

// out[0] = the sum of 32 values, by shuffles.
template <bool ALL_LANES>
__global__ void warp_sum(const float* in, float* out) {
  float sum = in[threadIdx.x];
  if (ALL_LANES || threadIdx.x < 16) {
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) out[0] = sum;
}

__global__ void outside_its_mask(int* out) { out[threadIdx.x] = __any_sync(0xffff, 1); }

// rank[i] = how many before i have its value, count[0] = how many blocks ran.
__global__ void rank_of_equals(const int* in, int* rank, int* count, float unused) {
  const unsigned equals = __match_any_sync(~0u, in[threadIdx.x]);
  rank[threadIdx.x] = __popc(equals & ((1u << threadIdx.x) - 1));
  if (threadIdx.x == 0) atomicAdd(count, 1);
}

// Without the check, the last block writes past the end.
template <bool CHECK>
__global__ void fill(float* out, long long n) {
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (!CHECK || i < n) out[i] = 1;
}

__global__ void fill_wide(float* out) { reinterpret_cast<float4*>(out)[threadIdx.x] = make_float4(1, 1, 1, 1); }
