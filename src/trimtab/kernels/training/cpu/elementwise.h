// RMSNorm, SwiGLU and softmax cross entropy over rows, forward and backward, in float32.
//
// Sums over rows are made of the sums of fixed chunks in ascending order: results do not depend on the number of
// threads.
#pragma once
#include "tile.h"

constexpr i64 CHUNK_ROWS = 64;
constexpr i64 CHUNK_ELEMENTS = 1 << 14;
static inline i64 chunks(i64 n, i64 size) { return (n + size - 1) / size; }
template <class F> static inline void over_chunks(i64 n, i64 size, int threads, F f) {
  in_parallel(chunks(n, size), threads, [&](i64 c) { f(c, c * size, (c + 1) * size < n ? (c + 1) * size : n); });
}

// y = x / rms(x) * weight and inverse[n] = 1 / rms(x) for x[n, d], d a multiple of 16.
static inline void rms_forward(const float* x, const float* weight, i64 n, i64 d, float eps, float* y, float* inverse,
                               int threads) {
  over_chunks(n, CHUNK_ROWS, threads, [&](i64, i64 begin, i64 end) {
    for (i64 r = begin; r < end; r++) {
      const float* row = x + r * d;
      V squares{};
      for (i64 i = 0; i < d; i += 16) squares += loadv(row + i) * loadv(row + i);
      const float inv = 1 / sqrtf(sum_lanes(squares) / d + eps);
      for (i64 i = 0; i < d; i += 16) storev(y + r * d + i, loadv(row + i) * inv * loadv(weight + i));
      inverse[r] = inv;
    }
  });
}
// d_x[n, d] and d_weight[d] from d_y[n, d].
static inline void rms_backward(const float* x, const float* weight, const float* inverse, const float* d_y, i64 n,
                                i64 d, float* d_x, float* d_weight, int threads) {
  Floats partial(chunks(n, CHUNK_ROWS) * d, 0.0f);
  over_chunks(n, CHUNK_ROWS, threads, [&](i64 c, i64 begin, i64 end) {
    float* sums = partial.data() + c * d;
    for (i64 r = begin; r < end; r++) {
      const float *row = x + r * d, *dy = d_y + r * d, inv = inverse[r];
      V along{};
      for (i64 i = 0; i < d; i += 16) along += loadv(dy + i) * loadv(weight + i) * loadv(row + i);
      const float pull = sum_lanes(along) * inv * inv / d;
      for (i64 i = 0; i < d; i += 16) {
        const V g = loadv(dy + i), value = loadv(row + i);
        storev(d_x + r * d + i, (g * loadv(weight + i) - value * pull) * inv);
        storev(sums + i, loadv(sums + i) + g * value * inv);
      }
    }
  });
  memset(d_weight, 0, d * sizeof(float));
  for (i64 c = 0; c < chunks(n, CHUNK_ROWS); c++)
    for (i64 i = 0; i < d; i += 16) storev(d_weight + i, loadv(d_weight + i) + loadv(partial.data() + c * d + i));
}

static inline V sigmoid(V x) {
  const V e = exp_neg(select(x > 0.0f, -x, x));
  return select(x > 0.0f, splat(1), e) / (e + 1.0f);
}
// f(offset, lanes) for sixteen elements at a time; the last few go through `tail`-sized copies.
template <int IN, int OUT, class F>
static inline void each(const float* const (&in)[IN], float* const (&out)[OUT], i64 n, int threads, F f) {
  over_chunks(n, CHUNK_ELEMENTS, threads, [&](i64, i64 begin, i64 end) {
    i64 i = begin;
    V x[IN], y[OUT];
    for (; i + 16 <= end; i += 16) {
      for (int j = 0; j < IN; j++) x[j] = loadv(in[j] + i);
      f(x, y);
      for (int j = 0; j < OUT; j++) storev(out[j] + i, y[j]);
    }
    if (i == end) return;
    float rest[16] = {};
    for (int j = 0; j < IN; j++) {
      memcpy(rest, in[j] + i, (end - i) * sizeof(float));
      x[j] = loadv(rest);
    }
    f(x, y);
    for (int j = 0; j < OUT; j++) {
      storev(rest, y[j]);
      memcpy(out[j] + i, rest, (end - i) * sizeof(float));
    }
  });
}
// silu(gate) * up
static inline void swiglu_forward(const float* gate, const float* up, i64 n, float* y, int threads) {
  each<2, 1>({gate, up}, {y}, n, threads, [](const V* x, V* to) { to[0] = x[0] * sigmoid(x[0]) * x[1]; });
}
static inline void swiglu_backward(const float* gate, const float* up, const float* d_y, i64 n, float* d_gate,
                                   float* d_up, int threads) {
  each<3, 2>({gate, up, d_y}, {d_gate, d_up}, n, threads, [](const V* x, V* to) {
    const V s = sigmoid(x[0]), silu = x[0] * s;
    to[0] = x[2] * x[1] * (s + silu * (1.0f - s));
    to[1] = x[2] * silu;
  });
}

// logits[n, vocab] become their gradient of sum(scales * (nll + z_loss * lse^2)); nll and lse are [n].
static inline void softmax_loss(float* logits, i64 n, i64 vocab, const i64* targets, const float* scales, float z_loss,
                                float* nll, float* lse, int threads) {
  in_parallel(n, threads, [&](i64 r) {
    float* row = logits + r * vocab;
    const i64 whole = vocab / 16 * 16, rest = vocab - whole;
    float tail[16];
    for (i64 i = 0; i < 16; i++) tail[i] = i < rest ? row[whole + i] : -INFINITY;
    V top = loadv(tail);
    for (i64 i = 0; i < whole; i += 16) top = larger(top, loadv(row + i));
    const float largest = max_lanes(top), chosen = row[targets[r]];
    V total = exp_neg(loadv(tail) - largest);
    storev(tail, total);
    for (i64 i = 0; i < whole; i += 16) {
      const V p = exp_neg(loadv(row + i) - largest);
      storev(row + i, p);
      total += p;
    }
    const float sum = sum_lanes(total), z = largest + logf(sum), by = scales[r] * (1 + 2 * z_loss * z) / sum;
    for (i64 i = 0; i < whole; i += 16) storev(row + i, loadv(row + i) * by);
    for (i64 i = 0; i < rest; i++) row[whole + i] = tail[i] * by;
    row[targets[r]] -= scales[r];
    nll[r] = z - chosen;
    lse[r] = z;
  });
}
