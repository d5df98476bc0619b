// What both files compute with: lanes of eight floats and an exponential that compilers vectorise.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float lane __attribute__((vector_size(32), aligned(4)));
typedef int32_t bits __attribute__((vector_size(32), aligned(4)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// exp to 2 ulp; 0 below exp(-87), and exp(88) above.
INLINE float exp_of(float given) {
  float x = given < -87.0f ? -87.0f : given > 88.0f ? 88.0f : given;
  float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  union { int32_t i; float f; } scale = {((int32_t)n + 127) << 23};
  return given < -87.0f ? 0.0f : p * scale.f;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

INLINE float total(lane x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE lane larger(lane a, lane b) {
  bits is_a = a > b;
  return (lane)(((bits)a & is_a) | ((bits)b & ~is_a));
}
