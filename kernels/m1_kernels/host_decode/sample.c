// The next token of every row by inverting the cumulative distribution.

#include "lanes.h"

#define BLOCK 64
#define LEAST -1e30f  // in place of minus infinity: times an exponential of 0 it is 0

// e = exp((x - top) / temperature) of up to 64 logits; sums of e and of e (x - top).
INLINE double sums_of(const float *restrict x, int64_t count, float top, float temperature,
                      float *restrict e, double *weighted) {
  float given[BLOCK];
  lane sum = {0}, moment = {0};
  for (int64_t i = 0; i < count; ++i) given[i] = x[i] - top > LEAST ? x[i] - top : LEAST;
  for (int64_t i = count; i < BLOCK; ++i) given[i] = LEAST;
  for (int64_t i = 0; i < BLOCK; ++i) e[i] = exp_of(given[i] / temperature);
  for (int64_t i = 0; i < BLOCK; i += 8) {
    sum += *(const lane *)(e + i);
    moment += *(const lane *)(e + i) * *(const lane *)(given + i);
  }
  *weighted += total(moment);
  return total(sum);
}

static double block_of(const float *x, int64_t count, float top, float temperature, float *e,
                       double *weighted) {
  if (count == BLOCK) return sums_of(x, BLOCK, top, temperature, e, weighted);  // vectorised
  return sums_of(x, count, top, temperature, e, weighted);
}

INLINE float largest(const float *restrict x, int64_t count) {
  lane tops = (lane){0} - INFINITY;
  float top = -INFINITY;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) tops = larger(*(const lane *)(x + i), tops);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  for (int64_t j = 0; j < 8; ++j) top = tops[j] > top ? tops[j] : top;
  return top;
}

// The first id whose cumulative weight exceeds a share `uniform` of the whole; its weight in *drawn.
static int64_t draw(const float *x, int64_t count, float top, float temperature, double uniform,
                    double *sums, double *drawn, double *all) {
  float e[BLOCK];
  double unused = 0.0, before = 0.0;
  *all = 0.0;
  for (int64_t i = 0; i < count; i += BLOCK) {
    sums[i / BLOCK] = block_of(x + i, least(count - i, BLOCK), top, temperature, e, &unused);
    *all += sums[i / BLOCK];
  }
  double threshold = uniform * *all;
  int64_t block = 0, is_found = 0;
  for (int64_t i = 0; i <= (count - 1) / BLOCK && !is_found; ++i) {
    if (sums[i] == 0.0) continue;
    block = i;
    is_found = before + sums[i] > threshold;
    if (!is_found) before += sums[i];
  }
  if (!is_found) threshold = INFINITY;  // by rounding; the last token with weight then
  block_of(x + block * BLOCK, least(count - block * BLOCK, BLOCK), top, temperature, e, &unused);
  int64_t token = 0;
  for (int64_t i = 0; i < BLOCK; ++i) {
    if (e[i] == 0.0f) continue;
    token = i;
    before += e[i];
    if (before > threshold) break;
  }
  *drawn = e[token];
  return block * BLOCK + token;
}

// Rows [B, stride] of logits over V ids, of which the first `num_tokens` may be drawn; temperature 0
// is greedy. `sums` has room for V / 64 + 1. Log-probabilities and entropies in nats.
void m1_sample(const float *logits, int64_t B, int64_t stride, int64_t V, int64_t num_tokens,
               const float *temperature, const double *uniform, double *sums, int64_t *tokens,
               float *logprobs, float *sampling_logprobs, float *entropies) {
  float e[BLOCK];
  for (int64_t row = 0; row < B; ++row) {
    const float *x = logits + row * stride;
    float best = largest(x, num_tokens), rest = largest(x + num_tokens, V - num_tokens);
    float top = rest > best ? rest : best, t = temperature[row];
    double sum = 0.0, weighted = 0.0, drawn, all;
    for (int64_t i = 0; i < V; i += BLOCK)
      sum += block_of(x + i, least(V - i, BLOCK), top, 1.0f, e, &weighted);
    entropies[row] = (float)(log(sum) - weighted / sum);
    if (t == 0.0f) {
      int64_t token = 0;
      while (token < num_tokens - 1 && x[token] != best) ++token;
      tokens[row] = token;
      sampling_logprobs[row] = 0.0f;
    } else {
      tokens[row] = draw(x, num_tokens, best, t, uniform[row], sums, &drawn, &all);
      sampling_logprobs[row] = (float)log(drawn / all);
    }
    logprobs[row] = (float)((double)(x[tokens[row]] - top) - log(sum));
  }
}
