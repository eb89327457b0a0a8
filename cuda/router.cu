// The router (scores, top-k and weights) and its backward, with a warp for each token and one pass over memory each.
#include "common.cuh"

namespace {

constexpr float kTiny = 1.17549435e-38f, kLowest = -3.402823466e38f;  // smallest normal float, lowest float
constexpr unsigned kNoExpert = 0xffffffffu;

// An unsigned integer, never 0, in the order of the floats. NaN is above all others, as in torch.topk.
__device__ unsigned order_of(float x) {
  if (x != x) return 0xffffffffu;
  unsigned bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float warp_max(float x) {
  for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}

__device__ float warp_sum(float x) {
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// The best of this lane's experts, which are lane, lane + 32, ... Its key is `order_of` the number that experts are
// chosen by, 0 if no expert is left. Of equal experts the lower one comes first.
struct Candidate {
  unsigned key, expert;
};

__device__ Candidate best_of_lane(const unsigned* key, int E) {
  Candidate best{0, kNoExpert};
#pragma unroll 4
  for (int e = threadIdx.x % 32; e < E; e += 32)
    if (key[e] > best.key) best = {key[e], unsigned(e)};
  return best;
}

}  // namespace

// From logits [T, E]: scores [T, E], their softmax or sigmoid; expert [T, k], the k experts of highest score
// (plus bias [E], if it is not null), highest first; weight [T, k], their scores, divided by their sum if
// `normalize`. k <= 32. Without bias, logits are compared instead of scores. They have the same order, and
// differ even where rounding makes scores equal. Shared memory: E words for each warp.
//
// With a NaN logit, all softmax scores of the token are NaN. A sigmoid score alone is NaN, and is then chosen
// first. In both cases one of the weights is NaN, as on a CPU, and all indices stay in [0, E).
__global__ void __launch_bounds__(128)
route(const float* __restrict__ logits, const float* __restrict__ bias, long long* __restrict__ expert,
      float* __restrict__ weight, float* __restrict__ scores, int T, int E, int k, int sigmoid, int normalize) {
  SHARED_MEMORY(unsigned, memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  long long t = (long long)blockIdx.x * (blockDim.x / 32) + warp;
  if (t >= T) return;
  logits += t * E, scores += t * E;
  unsigned* key = memory + warp * E;  // at first the bits of the logits; only its own lane reads and writes a key

  float top = kLowest, sum = 0;
#pragma unroll 4
  for (int e = lane; e < E; e += 32) {
    float x = logits[e];
    key[e] = __float_as_uint(x);
    top = fmaxf(top, x);  // ignores NaN, which then shows in the sum
  }
  if (!sigmoid) {
    top = warp_max(top);
#pragma unroll 4
    for (int e = lane; e < E; e += 32) sum += expf(__uint_as_float(key[e]) - top);
    sum = warp_sum(sum);
  }
  auto score = [&](float x) { return sigmoid ? 1 / (1 + expf(-x)) : expf(x - top) / sum; };
  for (int e = lane; e < E; e += 32) {
    float x = __uint_as_float(key[e]), s = score(x);
    scores[e] = s;
    key[e] = order_of(bias ? s + bias[e] : x);
  }

  // k rounds: take the best of all lanes. The lane that has it removes it and finds its next one.
  Candidate mine = best_of_lane(key, E);
  unsigned chosen = 0;  // lane j keeps choice j
  for (int j = 0; j < k; j++) {
    unsigned best = __reduce_max_sync(~0u, mine.key);
    unsigned e = __reduce_min_sync(~0u, mine.key == best ? mine.expert : kNoExpert);
    if (lane == j) chosen = e;
    if (mine.expert == e) {
      key[e] = 0;
      mine = best_of_lane(key, E);
    }
  }
  float chosen_score = score(logits[chosen]), total = 0;
  if (normalize)
    for (int j = 0; j < k; j++) total += __shfl_sync(~0u, chosen_score, j);
  if (lane < k) {
    expert[t * k + lane] = chosen;
    weight[t * k + lane] = normalize ? chosen_score / (total < kTiny ? kTiny : total) : chosen_score;
  }
}

// Gradient of logits [T, E] from the gradients of weight [T, k] and scores [T, E], either of which may be null for
// zero. With g the total gradient of a score s, it is s * (g - sum(g * s)) for softmax and s * (1 - s) * g for
// sigmoid. The g of a chosen expert has a second part, from its weight, which lane j adds for choice j.
__global__ void __launch_bounds__(128)
route_backward(const float* __restrict__ grad_weight, const float* __restrict__ grad_scores,
               const long long* __restrict__ expert, const float* __restrict__ scores,
               float* __restrict__ grad_logits, int T, int E, int k, int sigmoid, int normalize) {
  int lane = threadIdx.x % 32;
  long long t = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (t >= T) return;
  scores += t * E, grad_logits += t * E;
  if (grad_scores) grad_scores += t * E;

  bool chooses = lane < k;
  int e_chosen = chooses ? int(expert[t * k + lane]) : 0;
  float s_chosen = chooses ? scores[e_chosen] : 0, g_chosen = chooses && grad_weight ? grad_weight[t * k + lane] : 0;
  if (normalize) {  // weight = s / total, so the gradient of s is (g - sum(g * weight)) / total
    float sum = warp_sum(s_chosen), total = sum < kTiny ? kTiny : sum;
    float mean = warp_sum(g_chosen * s_chosen) / total;
    g_chosen = (g_chosen - (sum < kTiny ? 0 : mean)) / total;
  }

  float dot = 0;
  if (!sigmoid) {
    if (grad_scores)
      for (int e = lane; e < E; e += 32) dot += grad_scores[e] * scores[e];
    dot = warp_sum(dot + g_chosen * s_chosen);
  }
  auto gradient = [&](float s, float g) { return sigmoid ? s * (1 - s) * g : s * (g - dot); };
  for (int e = lane; e < E; e += 32) grad_logits[e] = gradient(scores[e], grad_scores ? grad_scores[e] : 0);
  __syncwarp();  // from here on, one lane each overwrites the gradients of chosen experts
  if (chooses) grad_logits[e_chosen] = gradient(s_chosen, g_chosen + (grad_scores ? grad_scores[e_chosen] : 0));
}
