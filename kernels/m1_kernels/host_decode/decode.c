// One decoding step of a hybrid model in float32, for a range of rows of the batch.
//
// Rows pass through all layers together. Every output is a sum over its inputs in their own order,
// one multiply-add after another, so a row's bits depend neither on the other rows nor on how the
// batch is cut into ranges.
//
// Weights of products are panels: [ceil(N / 16)][K][16], zero beyond N.
// M rows, h hidden, H heads, G key-value heads, D head dim, W = H D, F width of an expert.

#include "lanes.h"

#define PANEL 16
#define TILE 6

typedef struct {
  int64_t is_softmax, top_k, num_experts, ffn, shared_ffn;
  float attention_alpha, attention_beta, mlp_alpha, mlp_beta;
  const float *attention_norm, *mlp_norm;
  const float *in;    // lightning: q, k, v of each head, then the gate, 4 W; softmax: q, k, v of groups
  const float *bias;  // softmax only, or null
  const float *out;
  const float *inner_norm, *keep, *lost;  // lightning only: [W], [H] each: exp(-slope) = keep + lost
  float *states;                    // [slots, H, D, D]
  float *keys, *values;             // [pages, page_size, G, D]
  const float *router;              // null: one dense feed-forward, in shared_*
  const float *fc1, *fc2;           // of all experts
  const float *shared_fc1, *shared_fc2;
  int16_t *routed_experts;          // [pages, page_size, k], or null
} Layer;

typedef struct {
  int64_t num_layers, hidden, heads, groups, dim, rotary_dim, vocab, page_size, is_post_norm;
  float norm_epsilon, inner_epsilon;
  const float *embedding, *final_norm, *head, *inverse_frequencies;
  const Layer *layers;
} Model;

typedef struct {
  int64_t row_pages;
  const int64_t *tokens, *positions, *slots, *pages;
  float *logits;  // [B, padded(vocab)]
} Batch;

INLINE int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

static void silu(float *restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= sigmoid(x[i]);
}

INLINE float dot(const float *restrict a, const float *restrict b, int64_t n) {
  lane sum = {0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) sum += *(const lane *)(a + i) * *(const lane *)(b + i);
  float rest = 0.0f;
  for (; i < n; ++i) rest += a[i] * b[i];
  return total(sum) + rest;
}

static void norm(const float *restrict x, const float *restrict weight, float eps,
                 float *restrict out, int64_t n) {
  float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

INLINE void tile(int rows, const float *restrict x, int64_t stride, int64_t K,
                 const float *restrict panel, float *restrict out, int64_t out_stride) {
  lane low[TILE], high[TILE];
  for (int r = 0; r < rows; ++r) low[r] = high[r] = (lane){0};
  for (int64_t k = 0; k < K; ++k) {
    lane a = *(const lane *)(panel + k * PANEL), b = *(const lane *)(panel + k * PANEL + 8);
    for (int r = 0; r < rows; ++r) {
      float value = x[r * stride + k];
      low[r] += value * a;
      high[r] += value * b;
    }
  }
  for (int r = 0; r < rows; ++r) {
    *(lane *)(out + r * out_stride) = low[r];
    *(lane *)(out + r * out_stride + 8) = high[r];
  }
}

// out [M, padded(N)] = x [M, K] times panels.
static void product(const float *x, int64_t M, int64_t stride, int64_t K, const float *panels,
                    int64_t N, float *out) {
  int64_t width = padded(N);
  for (int64_t n = 0; n < width; n += PANEL, panels += K * PANEL) {
    for (int64_t m = 0; m < M; m += TILE) {
      const float *from = x + m * stride;
      float *to = out + m * width + n;
      switch (least(M - m, TILE)) {
        case 6: tile(6, from, stride, K, panels, to, width); break;
        case 5: tile(5, from, stride, K, panels, to, width); break;
        case 4: tile(4, from, stride, K, panels, to, width); break;
        case 3: tile(3, from, stride, K, panels, to, width); break;
        case 2: tile(2, from, stride, K, panels, to, width); break;
        default: tile(1, from, stride, K, panels, to, width);
      }
    }
  }
}

INLINE void recur(int64_t D, float keep, float lost, const float *restrict q,
                  const float *restrict k, const float *restrict v, float *restrict state,
                  float *restrict out) {
  for (int64_t e = 0; e < D; ++e) out[e] = 0.0f;
  for (int64_t d = 0; d < D; ++d) {
    float *restrict s = state + d * D;
    for (int64_t e = 0; e < D; ++e) {
      s[e] = keep * s[e] + (lost * s[e] + k[d] * v[e]);
      out[e] += q[d] * s[e];
    }
  }
}

// S <- lam S + k^T v with lam = keep + lost, o = q S of every head, then sigmoid(gate) * RMSNorm(o).
static void lightning(const Model *model, const Layer *layer, const Batch *batch, int64_t first,
                      int64_t M, float *both, float *out) {
  int64_t D = model->dim, H = model->heads, W = H * D, width = padded(4 * W);
  for (int64_t m = 0; m < M; ++m) {
    float *qkv = both + m * width, *gate = qkv + 3 * W, *o = out + m * W;
    float *state = layer->states + batch->slots[first + m] * H * D * D;
    silu(qkv, 3 * W);
    for (int64_t h = 0; h < H; ++h, qkv += 3 * D, state += D * D) {
      float keep = layer->keep[h], lost = layer->lost[h], *to = o + h * D;
      switch (D) {  // constants, so that the loops are unrolled
        case 16: recur(16, keep, lost, qkv, qkv + D, qkv + 2 * D, state, to); break;
        case 32: recur(32, keep, lost, qkv, qkv + D, qkv + 2 * D, state, to); break;
        case 64: recur(64, keep, lost, qkv, qkv + D, qkv + 2 * D, state, to); break;
        case 128: recur(128, keep, lost, qkv, qkv + D, qkv + 2 * D, state, to); break;
        default: recur(D, keep, lost, qkv, qkv + D, qkv + 2 * D, state, to);
      }
    }
    norm(o, layer->inner_norm, model->inner_epsilon, qkv - 3 * W, W);  // q, k, v are used up
    for (int64_t i = 0; i < W; ++i) o[i] = (qkv - 3 * W)[i] * sigmoid(gate[i]);
  }
}

// Cosines, then sines, of a position's angles.
static void turn(float position, const float *frequencies, int64_t half, float *out) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = cosf(position * frequencies[i]);
    out[half + i] = sinf(position * frequencies[i]);
  }
}

static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

static void attend(const Model *model, const Layer *layer, const int64_t *pages, int64_t length,
                   const float *q, int64_t group, float *scores, float *out) {
  int64_t D = model->dim, size = model->page_size, step = model->groups * D;
  float scale = 1.0f / sqrtf((float)D), top = -INFINITY, sum = 0.0f;
  for (int64_t t = 0; t < length; ++t) {
    const float *key = layer->keys + (pages[t / size] * size + t % size) * step + group * D;
    scores[t] = dot(q, key, D) * scale;
    top = scores[t] > top ? scores[t] : top;
  }
  for (int64_t t = 0; t < length; ++t) scores[t] = exp_of(scores[t] - top);
  memset(out, 0, D * sizeof(float));
  for (int64_t t = 0; t < length; ++t) {
    const float *value = layer->values + (pages[t / size] * size + t % size) * step + group * D;
    sum += scores[t];
    for (int64_t d = 0; d < D; ++d) out[d] += scores[t] * value[d];
  }
  for (int64_t d = 0; d < D; ++d) out[d] /= sum;
}

static void softmax(const Model *model, const Layer *layer, const Batch *batch, int64_t first,
                    int64_t M, float *qkv, const float *turns, float *scores, float *out) {
  int64_t D = model->dim, G = model->groups, each = model->heads / G, size = model->page_size;
  int64_t half = model->rotary_dim / 2, count = G * (each + 2) * D, width = padded(count);
  for (int64_t m = 0; m < M; ++m) {
    int64_t row = first + m, last = batch->positions[row];
    const int64_t *pages = batch->pages + row * batch->row_pages;
    const float *cos = turns + m * 2 * half, *sin = cos + half;
    float *x = qkv + m * width, *o = out + m * model->heads * D;
    for (int64_t i = 0; layer->bias && i < count; ++i) x[i] += layer->bias[i];
    for (int64_t g = 0; g < G; ++g, x += (each + 2) * D) {
      int64_t place = ((pages[last / size] * size + last % size) * G + g) * D;
      for (int64_t h = 0; h <= each; ++h) rotate(x + h * D, cos, sin, half);
      memcpy(layer->keys + place, x + each * D, D * sizeof(float));
      memcpy(layer->values + place, x + (each + 1) * D, D * sizeof(float));
      for (int64_t h = 0; h < each; ++h, o += D)
        attend(model, layer, pages, last + 1, x + h * D, g, scores, o);
    }
  }
}

// out [M, F] = SiLU(gate) * up, times a share, of x [M, 2 F].
static void swiglu(const float *x, int64_t M, int64_t F, const float *share, float *out) {
  for (int64_t m = 0; m < M; ++m) {
    const float *restrict gate = x + m * padded(2 * F), *restrict up = gate + F;
    float *restrict to = out + m * F, weight = share ? share[m] : 1.0f;
    for (int64_t i = 0; i < F; ++i) to[i] = gate[i] * sigmoid(gate[i]) * up[i] * weight;
  }
}

// The k largest of E logits, the earlier where they are equal; softmax over them.
static void choose(const float *logits, int64_t E, int64_t k, int64_t *chosen, float *share) {
  float sum = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; ++e) {
      int is_taken = 0;
      for (int64_t j = 0; j < i; ++j) is_taken |= chosen[j] == e;
      if (!is_taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    chosen[i] = best;
    share[i] = exp_of(logits[best] - logits[chosen[0]]);
    sum += share[i];
  }
  for (int64_t i = 0; i < k; ++i) share[i] /= sum;
}

typedef struct {
  float *residual, *x, *inner, *wide, *active, *rows, *narrow, *shares, *scores, *turns;
  int64_t *chosen, *members;
} Scratch;

// Adds to out [M, h] what the experts make of x [M, h].
static void experts(const Model *model, const Layer *layer, int64_t M, Scratch s, float *out) {
  int64_t h = model->hidden, E = layer->num_experts, k = layer->top_k, F = layer->ffn;
  int64_t wide = padded(2 * F), narrow = padded(h);
  product(s.x, M, h, h, layer->router, E, s.wide);
  for (int64_t m = 0; m < M; ++m)
    choose(s.wide + m * padded(E), E, k, s.chosen + m * k, s.shares + m * k);
  for (int64_t e = 0; e < E; ++e) {
    int64_t count = 0;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t i = 0; i < k; ++i) {
        if (s.chosen[m * k + i] != e) continue;
        memcpy(s.rows + count * h, s.x + m * h, h * sizeof(float));
        s.scores[count] = s.shares[m * k + i];
        s.members[count++] = m;
      }
    }
    product(s.rows, count, h, h, layer->fc1 + e * wide * h, 2 * F, s.wide);
    swiglu(s.wide, count, F, s.scores, s.active);
    product(s.active, count, F, F, layer->fc2 + e * narrow * F, h, s.narrow);
    for (int64_t c = 0; c < count; ++c) {
      float *restrict to = out + s.members[c] * h, *restrict from = s.narrow + c * narrow;
      for (int64_t i = 0; i < h; ++i) to[i] += from[i];
    }
  }
}

static void feed_forward(const Model *model, const Layer *layer, int64_t M, Scratch s, float *out) {
  int64_t h = model->hidden, F = layer->shared_ffn, narrow = padded(h);
  memset(out, 0, M * h * sizeof(float));
  if (layer->router) experts(model, layer, M, s, out);
  if (!layer->shared_fc1) return;
  product(s.x, M, h, h, layer->shared_fc1, 2 * F, s.wide);
  swiglu(s.wide, M, F, 0, s.active);
  product(s.active, M, F, F, layer->shared_fc2, h, s.narrow);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < h; ++i) out[m * h + i] += s.narrow[m * narrow + i];
}

// residual [M, h] <- alpha * (normed or not normed residual) + beta * branch [M, width].
static void add(const Model *model, int64_t M, Scratch s, float alpha, float beta,
                const float *branch, int64_t width) {
  int64_t h = model->hidden;
  const float *base = model->is_post_norm ? s.x : s.residual;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < h; ++i)
      s.residual[m * h + i] = alpha * base[m * h + i] + beta * branch[m * width + i];
}

static void record(const Model *model, const Layer *layer, const Batch *batch, int64_t first,
                   int64_t M, const int64_t *chosen) {
  int64_t size = model->page_size, k = layer->top_k;
  for (int64_t m = 0; m < M; ++m) {
    int64_t row = first + m, at = batch->positions[row];
    int64_t page = batch->pages[row * batch->row_pages + at / size];
    int16_t *to = layer->routed_experts + (page * size + at % size) * k;
    for (int64_t i = 0; i < k; ++i) to[i] = (int16_t)chosen[m * k + i];
  }
}

static void block(const Model *model, const Layer *layer, const Batch *batch, int64_t first,
                  int64_t M, Scratch s) {
  int64_t h = model->hidden, W = model->heads * model->dim;
  int64_t in = layer->is_softmax ? (model->heads + 2 * model->groups) * model->dim : 4 * W;
  for (int64_t m = 0; m < M; ++m)
    norm(s.residual + m * h, layer->attention_norm, model->norm_epsilon, s.x + m * h, h);
  product(s.x, M, h, h, layer->in, in, s.wide);
  if (layer->is_softmax)
    softmax(model, layer, batch, first, M, s.wide, s.turns, s.scores, s.inner);
  else
    lightning(model, layer, batch, first, M, s.wide, s.inner);
  product(s.inner, M, W, W, layer->out, h, s.narrow);
  add(model, M, s, layer->attention_alpha, layer->attention_beta, s.narrow, padded(h));
  for (int64_t m = 0; m < M; ++m)
    norm(s.residual + m * h, layer->mlp_norm, model->norm_epsilon, s.x + m * h, h);
  feed_forward(model, layer, M, s, s.inner);
  if (layer->router && layer->routed_experts) record(model, layer, batch, first, M, s.chosen);
  add(model, M, s, layer->mlp_alpha, layer->mlp_beta, s.inner, h);
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t widest(const Model *model) {
  int64_t W = model->heads * model->dim;
  int64_t found = most(padded(4 * W), padded((model->heads + 2 * model->groups) * model->dim));
  for (int64_t i = 0; i < model->num_layers; ++i) {
    const Layer *layer = model->layers + i;
    found = most(found, padded(2 * most(layer->ffn, layer->shared_ffn)));
    found = most(found, padded(layer->num_experts));
  }
  return found;
}

// Places of 4 bytes that `m1_decode` needs for M rows at a time; `lay` cuts them up.
static int64_t lay(const Model *model, const Batch *batch, int64_t M, float *memory, Scratch *s) {
  int64_t h = model->hidden, W = model->heads * model->dim, k = 1, used = 0;
  for (int64_t i = 0; i < model->num_layers; ++i) k = most(k, model->layers[i].top_k);
  int64_t sizes[] = {M * h, M * h, M * most(W, h), M * widest(model), M * widest(model) / 2, M * h,
                     M * padded(h), M * k, most(M, batch->row_pages * model->page_size),
                     M * model->rotary_dim, 2 * M * k, 2 * M};
  float *at[sizeof(sizes) / sizeof(*sizes)];
  for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); ++i) {
    at[i] = memory ? memory + used : 0;
    used += padded(sizes[i]);
  }
  *s = (Scratch){at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8],
                 at[9], (int64_t *)at[10], (int64_t *)at[11]};
  return used;
}

int64_t m1_decode_scratch(const Model *model, const Batch *batch, int64_t block_rows) {
  Scratch s;
  return lay(model, batch, block_rows, 0, &s);
}

// Rows `begin` to `end` of the batch, `block_rows` at a time.
void m1_decode(const Model *model, const Batch *batch, int64_t begin, int64_t end,
               int64_t block_rows, float *memory) {
  Scratch s;
  lay(model, batch, block_rows, memory, &s);
  int64_t h = model->hidden, V = model->vocab;
  for (int64_t first = begin; first < end; first += block_rows) {
    int64_t M = least(block_rows, end - first);
    for (int64_t m = 0; m < M; ++m) {
      memcpy(s.residual + m * h, model->embedding + batch->tokens[first + m] * h,
             h * sizeof(float));
      turn((float)batch->positions[first + m], model->inverse_frequencies, model->rotary_dim / 2,
           s.turns + m * model->rotary_dim);
    }
    for (int64_t i = 0; i < model->num_layers; ++i)
      block(model, model->layers + i, batch, first, M, s);
    for (int64_t m = 0; m < M; ++m)
      norm(s.residual + m * h, model->final_norm, model->norm_epsilon, s.x + m * h, h);
    product(s.x, M, h, h, model->head, V, batch->logits + first * padded(V));
  }
}
