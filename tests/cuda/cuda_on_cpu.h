// Runs CUDA C++ kernels on the CPU, for tests: the .cu files that ship, compiled by g++, every CUDA thread a fiber.
//
// The threads of a block take turns on one thread of the CPU. Each runs until it waits, at a barrier or in a warp
// primitive, for others that have not come yet; a round in which nobody gets further is a deadlock. The order in
// which threads and blocks take turns is chosen, so that a missing barrier shows.
#pragma once
#define TURNOUT_ON_CPU 1
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static  // one block runs at a time
#define SHARED_MEMORY(T, name) T* const name = reinterpret_cast<T*>(on_cpu::block->shared)

namespace on_cpu {

constexpr unsigned kWarp = 32;
enum Order { kForward, kReversed, kRandom };  // from kRandom on, a seed

struct Thread : Fiber {
  dim3 index;
  unsigned lane, warp;
};

// Where the lanes of a warp meet. Two rounds: a fast lane may be in the next one while others still read this one's.
struct Warp {
  uint64_t value[2][kWarp];
  unsigned arrived[2] = {0, 0}, mask[2] = {0, 0}, finished[2] = {0, 0};
  unsigned round[kWarp] = {};
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char* shared = nullptr;
  Thread* running = nullptr;
  void* scheduler = nullptr;                  // where the scheduler was left
  unsigned alive = 0, waiting = 0, barriers = 0;  // threads not done, threads at the barrier, barriers passed
  bool progress = false;
  const char* fault = nullptr;
  void (*call)(void*) = nullptr;  // the kernel with its arguments
  void* kernel = nullptr;
};
inline Block* block;

inline void yield() { switch_fiber(&block->running->saved, block->scheduler); }

[[noreturn]] inline void fail(const char* why) {
  block->fault = why;
  yield();
  abort();
}

inline void pass_barrier() {
  block->waiting = 0;
  block->barriers++;
}

inline void run_thread() {
  block->call(block->kernel);
  block->running->done = block->progress = true;
  block->alive--;
  if (block->alive && block->waiting == block->alive) pass_barrier();  // it no longer waits for those that are done
  yield();
  abort();
}

inline void barrier() {
  const unsigned passed = block->barriers;
  block->progress = true;
  if (++block->waiting == block->alive) pass_barrier();
  while (block->barriers == passed) yield();
}

// All lanes of `mask` meet here and see each other's values; those of other lanes are not to be used.
inline const uint64_t* meet(unsigned mask, uint64_t value) {
  const unsigned lane = block->running->lane;
  Warp& warp = block->warps[block->running->warp];
  const unsigned r = warp.round[lane]++ & 1;
  if (!(mask >> lane & 1)) fail("warp primitive: the calling lane is not in its mask");
  if (!warp.arrived[r]) warp.mask[r] = mask;
  if (warp.mask[r] != mask) fail("warp primitive: lanes disagree about the mask");
  block->progress = true;
  warp.value[r][lane] = value;
  warp.arrived[r] |= 1u << lane;
  const unsigned finished = warp.finished[r];
  if (warp.arrived[r] == mask) {
    warp.arrived[r] = 0;
    warp.finished[r]++;
  }
  while (warp.finished[r] == finished) yield();
  return warp.value[r];
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8, "warp primitives take up to 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  const uint64_t* values = meet(mask, bits_of(value));
  if (!(mask >> source & 1)) fail("shuffle: the lane that is read is not in the mask");
  T result;
  memcpy(&result, &values[source], sizeof result);
  return result;
}

inline void mix(std::vector<uint64_t>& order, int kind, std::mt19937_64& random) {
  if (kind >= kRandom) std::shuffle(order.begin(), order.end(), random);
}

inline std::vector<uint64_t> turns(uint64_t n, int kind) {
  std::vector<uint64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (kind == kReversed) std::reverse(order.begin(), order.end());
  return order;
}

inline void run_block(Block& b, int kind, std::mt19937_64& random) {
  block = &b;
  for (Thread& thread : b.threads) thread.start(run_thread);
  b.warps.assign((b.threads.size() + kWarp - 1) / kWarp, Warp());
  b.alive = b.threads.size();
  b.waiting = b.barriers = 0;
  std::vector<uint64_t> order = turns(b.threads.size(), kind);
  while (b.alive) {
    b.progress = false;
    mix(order, kind, random);
    for (uint64_t i : order) {
      if (b.threads[i].done) continue;
      b.running = &b.threads[i];
      switch_fiber(&b.scheduler, b.running->saved);
      if (b.fault) throw std::runtime_error(b.fault);
    }
    if (b.alive && !b.progress)
      throw std::runtime_error("deadlock: a barrier or warp primitive was not reached by all of its threads");
  }
}

template <class F>
void run_grid(F kernel, dim3 grid, dim3 size, size_t shared, int kind) {
  static std::vector<Thread> threads;  // kept for their stacks
  const unsigned n = size.x * size.y * size.z;
  if (!n || n > 1024) throw std::runtime_error("a block has 1 to 1024 threads; got " + std::to_string(n));
  Block b;
  threads.resize(n);
  b.threads.swap(threads);
  for (unsigned i = 0; i < n; i++) {
    b.threads[i].index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    b.threads[i].lane = i % kWarp;
    b.threads[i].warp = i / kWarp;
  }
  b.size = size;
  b.grid = grid;
  b.kernel = &kernel;
  b.call = [](void* f) { (*static_cast<F*>(f))(); };
  const std::unique_ptr<char[]> memory(new char[shared]);  // not a byte more, for the sanitizer to see its end
  b.shared = memory.get();
  std::mt19937_64 random(kind);
  std::vector<uint64_t> order = turns(uint64_t(grid.x) * grid.y * grid.z, kind);
  mix(order, kind, random);
  for (uint64_t i : order) {
    b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    memset(b.shared, 0xcd, shared);
    run_block(b, kind, random);
  }
  b.threads.swap(threads);
}

template <class... A, size_t... I>
void launch(void (*kernel)(A...), void** args, dim3 grid, dim3 size, size_t shared, int kind, std::index_sequence<I...>) {
  std::tuple<std::decay_t<A>...> values(*static_cast<std::decay_t<A>*>(args[I])...);
  run_grid([&] { kernel(std::get<I>(values)...); }, grid, size, shared, kind);
}

// Returns null, or what went wrong.
template <class... A>
const char* launch(void (*kernel)(A...), void** args, const unsigned* sizes, size_t shared, int kind) {
  static std::string error;
  const dim3 grid(sizes[0], sizes[1], sizes[2]), size(sizes[3], sizes[4], sizes[5]);
  try {
    launch(kernel, args, grid, size, shared, kind, std::index_sequence_for<A...>());
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

// The letter of a parameter's type, as in cuda/launch.py.
template <class T>
constexpr char letter() {
  using D = std::decay_t<T>;
  if (std::is_pointer_v<D>) return 'P';
  if (std::is_integral_v<D>) return sizeof(D) == 4 ? 'i' : sizeof(D) == 8 ? 'q' : '?';
  return std::is_same_v<D, float> ? 'f' : '?';
}
template <class... A>
const char* signature(void (*)(A...)) {
  static const char letters[] = {letter<A>()..., 0};
  return letters;
}

}  // namespace on_cpu

#define EXPORT_KERNEL(name, ...)                                                                            \
  extern "C" const char* name##_signature() { return on_cpu::signature(&__VA_ARGS__); }                     \
  extern "C" const char* name(void** args, const unsigned* sizes, size_t shared, int kind) {                \
    return on_cpu::launch(&__VA_ARGS__, args, sizes, shared, kind);                                         \
  }

#ifdef ON_CPU_COVERAGE
extern "C" void __gcov_dump();
extern "C" void dump_coverage() { __gcov_dump(); }
#endif

#define threadIdx (on_cpu::block->running->index)
#define blockIdx (on_cpu::block->index)
#define blockDim (on_cpu::block->size)
#define gridDim (on_cpu::block->grid)
constexpr int warpSize = on_cpu::kWarp;

inline void __syncthreads() { on_cpu::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { on_cpu::meet(mask, 0); }
inline void __threadfence() {}

// A shuffle stays inside its group of `width` lanes; a lane that would read outside gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = on_cpu::block->running->lane;
  return on_cpu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int lane = on_cpu::block->running->lane, source = lane ^ flip;
  return on_cpu::shuffle(mask, value, source < (lane | (width - 1)) + 1 ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = on_cpu::block->running->lane, source = lane + int(delta);
  return on_cpu::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = on_cpu::block->running->lane, source = lane - int(delta);
  return on_cpu::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = on_cpu::meet(mask, predicate != 0);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; i++)
    if ((mask >> i & 1) && values[i]) result |= 1u << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t own = on_cpu::bits_of(value);
  const uint64_t* values = on_cpu::meet(mask, own);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; i++)
    if ((mask >> i & 1) && values[i] == own) result |= 1u << i;
  return result;
}

template <class F>
unsigned reduce_lanes(unsigned mask, unsigned value, F pick) {
  const uint64_t* values = on_cpu::meet(mask, value);
  for (unsigned i = 0; i < 32; i++)
    if (mask >> i & 1) value = pick(value, unsigned(values[i]));
  return value;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduce_lanes(mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return reduce_lanes(mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline float __expf(float v) { return expf(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
inline int __float_as_int(float v) { int i; memcpy(&i, &v, 4); return i; }
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float v) { unsigned i; memcpy(&i, &v, 4); return i; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }

// One thread runs at a time: plain reads and writes are atomic.
template <class T> T atomicExch(T* p, std::common_type_t<T> v) { return std::exchange(*p, v); }
template <class T> T atomicAdd(T* p, std::common_type_t<T> v) { return std::exchange(*p, *p + v); }
template <class T> T atomicSub(T* p, std::common_type_t<T> v) { return std::exchange(*p, *p - v); }
template <class T> T atomicMax(T* p, std::common_type_t<T> v) { return std::exchange(*p, std::max<T>(*p, v)); }
template <class T> T atomicMin(T* p, std::common_type_t<T> v) { return std::exchange(*p, std::min<T>(*p, v)); }
template <class T> T atomicOr(T* p, std::common_type_t<T> v) { return std::exchange(*p, *p | v); }
template <class T> T atomicCAS(T* p, std::common_type_t<T> was, std::common_type_t<T> v) {
  return std::exchange(*p, *p == was ? v : *p);
}

using std::max;
using std::min;
