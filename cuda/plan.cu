// The plan: a stable counting sort of assignments by expert, in two launches.
//   plan_count  Every block counts its chunk of the assignments: histogram [blocks, E].
//   plan_place  The row of an assignment is its expert's first row, plus the expert's assignments in earlier
//               chunks, plus the earlier ones in the same chunk. Rows that remain are marked empty.
// The order within a chunk is kept without atomics. Each counting warp has bins of its own, and a contiguous
// piece of the chunk. It takes 32 assignments at a time, in order. __match_any_sync finds the lanes with the
// same expert, and the position of a lane among them is the number of lower lanes in the match.
//
// There are n = T * k < 2^31 assignments. An expert id outside [0, E) is no assignment.
#include "common.cuh"

namespace {

constexpr int kBatch = 8;  // loads under way in each lane; a warp takes 32 * kBatch assignments at once
constexpr int kThreads = 256;

struct Range {
  long long begin, end;
};

// Piece `i` of `pieces` equal pieces of [begin, end). The last ones may be shorter.
__device__ Range piece(Range all, int i, int pieces) {
  long long size = (all.end - all.begin + pieces - 1) / pieces;
  long long begin = min(all.begin + i * size, all.end);
  return {begin, min(begin + size, all.end)};
}

__device__ Range chunk_of_block(int n) { return piece({0, n}, blockIdx.x, gridDim.x); }

// One warp goes through its assignments in order, and increments bins[e] for each. It calls `visit(i, e, row)`
// for each assignment i, with row = bins[e] before the increment, and e = row = -1 if i has no expert.
template <class Visit>
__device__ void walk(const long long* __restrict__ expert, Range range, int E, int* bins, Visit visit) {
  unsigned lane = threadIdx.x % 32, lower = (1u << lane) - 1;
  for (long long first = range.begin; first < range.end; first += 32 * kBatch) {
    int id[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      long long i = first + 32 * j + lane;
      long long e = i < range.end ? expert[i] : -1;
      id[j] = e >= 0 && e < E ? int(e) : -1;
    }
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      long long i = first + 32 * j + lane;
      unsigned same = __match_any_sync(~0u, id[j]);
      int row = id[j] < 0 ? -1 : bins[id[j]] + __popc(same & lower);
      __syncwarp();  // all lanes have read the bins
      if (id[j] >= 0 && !(same & lower)) bins[id[j]] += __popc(same);
      __syncwarp();  // the bins count these 32 assignments
      if (i < range.end) visit(i, id[j], row);
    }
  }
}

// Exclusive prefix sum of values[0..n), by the whole block; returns the sum of all. Each warp scans a piece,
// then adds the sums of the pieces before it.
__device__ int exclusive_scan(int* values, int n) {
  __shared__ int held[kThreads / 32];
  int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, carry = 0;
  Range mine = piece({0, n}, warp, warps);
  for (int first = mine.begin; first < mine.end; first += 32) {
    int i = first + lane, value = i < mine.end ? values[i] : 0, sum = value;
    for (int step = 1; step < 32; step *= 2) {
      int before = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += before;
    }
    if (i < mine.end) values[i] = carry + sum - value;
    carry += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) held[warp] = carry;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < warps; w++) {
    before += w < warp ? held[w] : 0;
    all += held[w];
  }
  for (int i = mine.begin + lane; i < mine.end; i += 32) values[i] += before;
  __syncthreads();
  return all;
}

}  // namespace

// histogram[block, e]: number of assignments of expert e in the block's chunk. Shared memory: bins [counters, E].
__global__ void __launch_bounds__(kThreads, 4)
plan_count(const long long* __restrict__ expert, int* __restrict__ histogram, int n, int E, int counters) {
  SHARED_MEMORY(int, bins);
  int warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < counters * E; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  if (warp < counters)
    walk(expert, piece(chunk_of_block(n), warp, counters), E, bins + warp * E, [](long long, int, int) {});
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < counters; w++) sum += bins[w * E + e];
    histogram[(long long)blockIdx.x * E + e] = sum;
  }
}

// token [R], slot [n] and counts [E] of `Plan`, with the same grid, n, E and counters as plan_count. The plan is
// ragged if capacity < 0, with R = n rows. Otherwise R = E * capacity, and assignments over capacity are dropped.
// Shared memory: bins [counters, E], total [E].
__global__ void __launch_bounds__(kThreads, 4)
plan_place(const long long* __restrict__ expert, const int* __restrict__ histogram, long long* __restrict__ token,
           long long* __restrict__ slot, long long* __restrict__ counts, int n, int k, int E, int counters,
           int capacity) {
  SHARED_MEMORY(int, bins);
  int* total = bins + counters * E;  // assignments of each expert; in a ragged plan, later its first row
  int warp = threadIdx.x / 32;
  bool ragged = capacity < 0;

  // Every block sums the columns of the histogram itself, because a third launch would cost more.
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int before = 0, all = 0;
#pragma unroll 16
    for (unsigned b = 0; b < gridDim.x; b++) {
      int count = histogram[(long long)b * E + e];
      before += b < blockIdx.x ? count : 0;
      all += count;
    }
    bins[e] = before;
    total[e] = all;
    if (blockIdx.x == 0) counts[e] = max(all, capacity);
  }
  for (int i = E + threadIdx.x; i < counters * E; i += blockDim.x) bins[i] = 0;
  __syncthreads();

  // Mark empty rows. They follow all kept rows in a ragged plan, and each expert's rows in a padded one.
  if (ragged) {
    int kept = exclusive_scan(total, E);
    for (long long row = kept + (long long)blockIdx.x * blockDim.x + threadIdx.x; row < n;
         row += (long long)gridDim.x * blockDim.x)
      token[row] = -1;
  } else {
    for (int e = blockIdx.x; e < E; e += gridDim.x)
      for (int row = total[e] + threadIdx.x; row < capacity; row += blockDim.x)
        token[(long long)e * capacity + row] = -1;
  }

  // Each warp but the last counts its piece into the next warp's bins. Then bins[w, e] becomes the row of the
  // first assignment of expert e in warp w's piece. In a padded plan it counts from the expert's first row.
  Range chunk = chunk_of_block(n);
  if (warp + 1 < counters)
    walk(expert, piece(chunk, warp, counters), E, bins + (warp + 1) * E, [](long long, int, int) {});
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int row = ragged ? total[e] : 0;
    for (int w = 0; w < counters; w++) bins[w * E + e] = row += bins[w * E + e];
  }
  __syncthreads();

  if (warp < counters)
    walk(expert, piece(chunk, warp, counters), E, bins + warp * E, [&](long long i, int e, int position) {
      bool kept = e >= 0 && (ragged || position < capacity);
      long long row = !kept ? -1 : ragged ? position : (long long)e * capacity + position;
      slot[i] = row;
      if (kept) token[row] = unsigned(i) / unsigned(k);
    });
}
