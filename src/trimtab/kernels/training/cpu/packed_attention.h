// Attention over packed segments, forward and backward, in float32: FlashAttention-2 (arXiv 2307.08691) for CPUs.
//
// Scores exist for one block of queries and keys at a time. The forward keeps each row's logsumexp, from which the
// backward makes the probabilities again. Each piece of work owns what it writes and adds in one order, so results
// do not depend on the number of threads.
#pragma once
#include "tile.h"

constexpr int BLOCK = 96;               // queries, and keys, of a block: a multiple of ROWS and of 16
constexpr int BLOCK_ROW = BLOCK + 16;   // its rows in memory, so that columns do not share cache sets

// Queries and keys are stored head by head after rotation, [heads][N][d], queries times 1 / sqrt(d).
struct Packed {
  i64 N, S;
  i64 H, G, d;
  i64 causal, window;                        // window 0: none
  const i64* bounds;                         // [S + 1]
  const float *cos, *sin;                    // [N, d / 2]
  const float *q, *k, *v;                    // [N, heads, d]; not read by the backward but for v
  float *rotated_q, *rotated_k, *out, *lse;  // [H][N][d], [G][N][d], [N, H, d], [H][N]
};
struct PackedGradient {
  const float* d_out;         // [N, H, d]
  float *d_q, *d_k, *d_v;     // [N, heads, d]
};

// Rows of a segment of n that a row sees, and rows that see it; both grow with the row.
struct Sight {
  i64 n, causal, window;
  Span keys(i64 row) const {
    return {window && row >= window ? row - window + 1 : 0, causal ? row + 1 : ahead(row)};
  }
  Span queries(i64 row) const { return {causal ? row : behind(row), ahead(row)}; }
  i64 ahead(i64 row) const { return window && row + window < n ? row + window : n; }
  i64 behind(i64 row) const { return window && row >= window ? row - window + 1 : 0; }
  Span keys(i64 first, i64 last) const { return {keys(first).begin, keys(last).end}; }
  Span queries(i64 first, i64 last) const { return {queries(first).begin, queries(last).end}; }
};
static inline Span moved(Span s, i64 by, i64 size) { return overlap({s.begin - by, s.end - by}, {0, size}); }
static inline i64 blocks(i64 n, i64 size) { return (n + size - 1) / size; }

// x[heads, d] of one row turned by its angles, to (or from, backwards) one row of each head.
static inline void turn(const float* x, const float* cos, const float* sin, i64 half, float sign, float scale, float* y) {
  for (i64 i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half], s = sign * sin[i];
    y[i] = (a * cos[i] - b * s) * scale;
    y[i + half] = (b * cos[i] + a * s) * scale;
  }
}
// Rows x[n, d] with `row` floats between them, as panels [n / 16][d][16]; missing rows are zero.
static inline void transpose(const float* x, i64 row, i64 n, i64 d, float* panels) {
  for (i64 p = 0; p < n; p += 16)
    for (i64 j = 0; j < 16; j++) {
      float* to = panels + p * d + j;
      const float* from = x + (p + j) * row;
      for (i64 i = 0; i < d; i++) to[16 * i] = p + j < n ? from[i] : 0;
    }
}

// Scores of a block, S[rows, cols] = A B, only where some row of a tile sees a key.
static inline void scores(const Sight& s, const float* a, const float* panels, i64 d, i64 r0, int rows, i64 c0, int cols,
                          float* block) {
  product<false>(
      Left{a, d, 1}, Right{panels + c0 * d, 16, 16 * d}, rows, (int)blocks(cols, 16), block, BLOCK_ROW,
      [&](i64, i64) { return Span{0, d}; }, [&](i64 m, i64 last) { return moved(s.keys(r0 + m, r0 + last), c0, cols); });
}
// The lanes of x that stand at `at` and on, with `other` in those that are not seen.
static inline V inside(V x, i64 at, Span seen, float other) {
  if (at >= seen.begin && at + 16 <= seen.end) return x;
  float lanes[16];
  storev(lanes, x);
  for (i64 i = 0; i < 16; i++)
    if (at + i < seen.begin || at + i >= seen.end) lanes[i] = other;
  return loadv(lanes);
}
static inline void clear(float* row, i64 begin, i64 end) {
  if (begin < end) memset(row + begin, 0, (end - begin) * sizeof(float));
}

// One step of the running softmax: S becomes exp(S - largest), of which `sum` is the total; `out` is rescaled.
static inline void softmax_step(float* row, Span seen, i64 width, float& largest, float& sum, float* out, i64 d) {
  if (seen.empty()) return clear(row, 0, width);
  const i64 begin = seen.begin / 16 * 16, end = blocks(seen.end, 16) * 16;
  V top = splat(-INFINITY);
  for (i64 j = begin; j < end; j += 16) {
    const V x = inside(loadv(row + j), j, seen, -INFINITY);
    storev(row + j, x);
    top = larger(top, x);
  }
  const float before = largest, best = max_lanes(top);
  largest = best > before ? best : before;
  V total{};
  for (i64 j = begin; j < end; j += 16) {
    const V p = exp_neg(loadv(row + j) - largest);
    storev(row + j, p);
    total += p;
  }
  clear(row, 0, begin);
  clear(row, end, width);
  if (largest != before) {
    const float shrink = expf(before - largest);
    sum *= shrink;
    for (i64 i = 0; i < d; i += 16) storev(out + i, loadv(out + i) * shrink);
  }
  sum += sum_lanes(total);
}

struct AttentionScratch {
  Floats block = Floats(BLOCK * BLOCK_ROW), other = Floats(BLOCK * BLOCK_ROW), sums, more;
};
static inline AttentionScratch& attention_scratch(i64 d) {
  static thread_local AttentionScratch scratch;
  if ((i64)scratch.sums.size() < BLOCK * d) {
    scratch.sums.resize(BLOCK * d);
    scratch.more.resize(BLOCK * d);
  }
  return scratch;
}

static inline void attend_block(const Packed& a, i64 s, i64 h, i64 r0, const float* k_panels, const float* v) {
  const i64 d = a.d, first = a.bounds[s], n = a.bounds[s + 1] - first;
  const Sight sight{n, a.causal, a.window};
  const int rows = (int)(n - r0 < BLOCK ? n - r0 : BLOCK);
  AttentionScratch& scratch = attention_scratch(d);
  float *block = scratch.block.data(), *out = scratch.sums.data();
  float largest[BLOCK], sum[BLOCK];
  for (int r = 0; r < rows; r++) largest[r] = -INFINITY, sum[r] = 0;
  memset(out, 0, rows * d * sizeof(float));
  const Span all = sight.keys(r0, r0 + rows - 1);
  for (i64 c0 = all.begin / BLOCK * BLOCK; c0 < all.end; c0 += BLOCK) {
    const int cols = (int)(n - c0 < BLOCK ? n - c0 : BLOCK);
    scores(sight, a.rotated_q + (h * a.N + first + r0) * d, k_panels, d, r0, rows, c0, cols, block);
    for (int r = 0; r < rows; r++)
      softmax_step(block + r * BLOCK_ROW, moved(sight.keys(r0 + r), c0, cols), blocks(cols, 16) * 16, largest[r], sum[r],
                   out + r * d, d);
    product<true>(
        Left{block, BLOCK_ROW, 1}, Right{v + c0 * d, d, 16}, rows, (int)(d / 16), out, d,
        [&](i64 m, i64 last) { return moved(sight.keys(r0 + m, r0 + last), c0, cols); },
        [&](i64, i64) { return Span{0, d}; });
  }
  for (int r = 0; r < rows; r++) {
    const float inverse = 1 / sum[r];
    float* to = a.out + ((first + r0 + r) * a.H + h) * d;
    for (i64 i = 0; i < d; i += 16) storev(to + i, loadv(out + r * d + i) * inverse);
    a.lse[h * a.N + first + r0 + r] = largest[r] + logf(sum[r]);
  }
}

static inline void packed_forward(const Packed& a, int threads) {
  const i64 d = a.d, half = d / 2;
  const float scale = 1 / sqrtf((float)d);
  struct Piece { i64 segment, row; };
  std::vector<Piece> pieces;        // a block of queries each
  std::vector<i64> at(a.S + 1, 0);  // where a segment's panels begin, in rows
  for (i64 s = 0; s < a.S; s++) {
    const i64 n = a.bounds[s + 1] - a.bounds[s];
    at[s + 1] = at[s] + blocks(n, 16) * 16;
    for (i64 r = 0; r < n; r += BLOCK) pieces.push_back({s, r});
  }
  Floats panels(a.G * at[a.S] * d), values(a.G * a.N * d);
  in_parallel((i64)pieces.size(), threads, [&](i64 i) {
    const auto [s, r0] = pieces[i];
    const i64 first = a.bounds[s], begin = first + r0, end = a.bounds[s + 1];
    const i64 count = end - begin < BLOCK ? end - begin : BLOCK;
    for (i64 row = begin; row < begin + count; row++) {
      const float *cos = a.cos + row * half, *sin = a.sin + row * half;
      for (i64 h = 0; h < a.H; h++) turn(a.q + (row * a.H + h) * d, cos, sin, half, 1, scale, a.rotated_q + (h * a.N + row) * d);
      for (i64 g = 0; g < a.G; g++) {
        turn(a.k + (row * a.G + g) * d, cos, sin, half, 1, 1, a.rotated_k + (g * a.N + row) * d);
        memcpy(values.data() + (g * a.N + row) * d, a.v + (row * a.G + g) * d, d * sizeof(float));
      }
    }
    for (i64 g = 0; g < a.G; g++)
      transpose(a.rotated_k + (g * a.N + begin) * d, d, count, d, panels.data() + (g * at[a.S] + at[s] + r0) * d);
  });
  in_parallel((i64)pieces.size() * a.H, threads, [&](i64 i) {
    // The longest pieces first: blocks late in a segment see the most keys.
    const auto [s, r0] = pieces[pieces.size() - 1 - i / a.H];
    const i64 h = i % a.H, g = h * a.G / a.H;
    attend_block(a, s, h, r0, panels.data() + (g * at[a.S] + at[s]) * d, values.data() + (g * a.N + a.bounds[s]) * d);
  });
}

// Gradients of one head of a segment with respect to its rotated queries and keys and its values, [n, d] each.
static inline void head_gradients(const Packed& a, const float* d_out, i64 s, i64 h, float* d_q, float* d_k, float* d_v) {
  const i64 d = a.d, first = a.bounds[s], n = a.bounds[s + 1] - first, g = h * a.G / a.H;
  const Sight sight{n, a.causal, a.window};
  const float *q = a.rotated_q + (h * a.N + first) * d, *k = a.rotated_k + (g * a.N + first) * d;
  const float* lse = a.lse + h * a.N + first;
  const i64 padded = blocks(n, 16) * 16;
  Floats k_panels(padded * d), v_panels(padded * d), d_o(n * d), delta(n);
  transpose(k, d, n, d, k_panels.data());
  transpose(a.v + (first * a.G + g) * d, a.G * d, n, d, v_panels.data());
  for (i64 r = 0; r < n; r++) {
    const float *from = d_out + ((first + r) * a.H + h) * d, *out = a.out + ((first + r) * a.H + h) * d;
    V sum{};
    for (i64 i = 0; i < d; i += 16) {
      const V x = loadv(from + i);
      storev(d_o.data() + r * d + i, x);
      sum += x * loadv(out + i);
    }
    delta[r] = sum_lanes(sum);
  }
  memset(d_q, 0, n * d * sizeof(float));
  memset(d_k, 0, n * d * sizeof(float));
  memset(d_v, 0, n * d * sizeof(float));
  AttentionScratch& scratch = attention_scratch(d);
  float *p = scratch.block.data(), *ds = scratch.other.data();
  auto whole = [&](i64, i64) { return Span{0, d}; };
  for (i64 c0 = 0; c0 < n; c0 += BLOCK) {
    const int cols = (int)(n - c0 < BLOCK ? n - c0 : BLOCK);
    const i64 width = blocks(cols, 16) * 16;
    const Span all = sight.queries(c0, c0 + cols - 1);
    for (i64 r0 = all.begin / BLOCK * BLOCK; r0 < all.end; r0 += BLOCK) {
      const int rows = (int)(n - r0 < BLOCK ? n - r0 : BLOCK);
      auto keys = [&](i64 m, i64 last) { return moved(sight.keys(r0 + m, r0 + last), c0, cols); };
      auto queries = [&](i64 m, i64 last) { return moved(sight.queries(c0 + m, c0 + last), r0, rows); };
      scores(sight, q + r0 * d, k_panels.data(), d, r0, rows, c0, cols, p);
      scores(sight, d_o.data() + r0 * d, v_panels.data(), d, r0, rows, c0, cols, ds);
      for (int r = 0; r < rows; r++) {
        const Span seen = keys(r, r);
        float *p_row = p + r * BLOCK_ROW, *ds_row = ds + r * BLOCK_ROW;
        const i64 begin = seen.empty() ? 0 : seen.begin / 16 * 16, end = seen.empty() ? 0 : blocks(seen.end, 16) * 16;
        for (i64 j = begin; j < end; j += 16) {
          const V x = exp_neg(inside(loadv(p_row + j) - lse[r0 + r], j, seen, -INFINITY));
          storev(p_row + j, x);
          storev(ds_row + j, inside(x * (loadv(ds_row + j) - delta[r0 + r]), j, seen, 0));
        }
        for (float* row : {p_row, ds_row}) clear(row, 0, begin), clear(row, end, width);
      }
      product<true>(Left{p, 1, BLOCK_ROW}, Right{d_o.data() + r0 * d, d, 16}, cols, (int)(d / 16), d_v + c0 * d, d, queries, whole);
      product<true>(Left{ds, 1, BLOCK_ROW}, Right{q + r0 * d, d, 16}, cols, (int)(d / 16), d_k + c0 * d, d, queries, whole);
      product<true>(Left{ds, BLOCK_ROW, 1}, Right{k + c0 * d, d, 16}, rows, (int)(d / 16), d_q + r0 * d, d, keys, whole);
    }
  }
}

static inline void packed_backward(const Packed& a, const PackedGradient& b, int threads) {
  const i64 d = a.d, half = d / 2, size = a.H * a.N * d, group = a.H / a.G;
  const float scale = 1 / sqrtf((float)d);
  Floats all(3 * size);  // gradients of every query head: for queries, keys, values
  float *d_q = all.data(), *d_k = d_q + size, *d_v = d_k + size;
  in_parallel(a.S * a.H, threads, [&](i64 i) {
    const i64 s = i / a.H, h = i % a.H, at = (h * a.N + a.bounds[s]) * d;
    head_gradients(a, b.d_out, s, h, d_q + at, d_k + at, d_v + at);
  });
  in_parallel(blocks(a.N, 64), threads, [&](i64 i) {
    for (i64 row = 64 * i; row < 64 * i + 64 && row < a.N; row++) {
      const float *cos = a.cos + row * half, *sin = a.sin + row * half;
      for (i64 h = 0; h < a.H; h++) turn(d_q + (h * a.N + row) * d, cos, sin, half, -1, scale, b.d_q + (row * a.H + h) * d);
      for (i64 g = 0; g < a.G; g++) {
        float *k_sum = d_k + (g * group * a.N + row) * d, *v_sum = d_v + (g * group * a.N + row) * d;
        for (i64 h = 1; h < group; h++)
          for (i64 i = 0; i < d; i++) k_sum[i] += k_sum[h * a.N * d + i], v_sum[i] += v_sum[h * a.N * d + i];
        turn(k_sum, cos, sin, half, -1, 1, b.d_k + (row * a.G + g) * d);
        memcpy(b.d_v + (row * a.G + g) * d, v_sum, d * sizeof(float));
      }
    }
  });
}
