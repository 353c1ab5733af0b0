// y[m, n] = sum_k x[m, k] * w[n, k] with w row-major exactly as in the checkpoint (nothing is repacked).
//
// Batch invariance: every output element is one accumulator of sixteen lanes that walks k in ascending
// chunks, then one fixed tree sum. Tile sizes, thread count and the number of rows never change that order,
// so a row's result is bit-identical whatever else is in the batch.
//
// Weights in int8 are multiplied as the whole numbers that they are; `scaled` gives the sum its row's factor.
#pragma once
#include "simd.h"

// A sum over row n of w as the number it stands for. An explicit fma: compilers may not join the product with what is
// added next, which they would do in some instances of a template and not in others.
template <class W> static inline float scaled(float y, const float* scale, int n) {
  if constexpr (std::is_same_v<W, i8>) return fmaf(y, scale[n], 0.0f);
  else return y;
}

// MR rows of x (prepared layout, stride ldx) times NR rows of w.
template <class W, int MR, int NR>
static inline void accumulate(const float* x, int ldx, const W* w, i64 K, int m0, int n0, V (&acc)[MR][NR]) {
  const int full = (int)(K / CHUNK) * CHUNK;
  const W* row[NR];
  for (int j = 0; j < NR; j++) row[j] = w + (i64)(n0 + j) * K;
  const float* xr = x + (i64)m0 * ldx;
  for (int k = 0; k < full; k += CHUNK) {
    V a[NR], b[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      if (MR == 1) __builtin_prefetch(row[j] + k + NR * K, 0, 2);
      load32(row[j] + k, a[j], b[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      V xa = loadv(xr + (i64)i * ldx + k);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] += xa * a[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      V xb = loadv(xr + (i64)i * ldx + k + LANES);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] += xb * b[j];
    }
  }
  if (full < K) {
    for (int j = 0; j < NR; j++) {
      V a, b;
      load_tail(row[j] + full, (int)(K - full), a, b);
      for (int i = 0; i < MR; i++) {
        acc[i][j] += loadv(xr + (i64)i * ldx + full) * a;
        acc[i][j] += loadv(xr + (i64)i * ldx + full + LANES) * b;
      }
    }
  }
}
#if defined(__AVX512BF16__)
template <int MR, int NR>
static inline void accumulate(const bf16* x, int ldx, const bf16* w, i64 K, int m0, int n0, V (&acc)[MR][NR]) {
  auto load = [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); };
  auto add = [](V a, __m512bh p, __m512bh q) { return (V)_mm512_dpbf16_ps((__m512)a, p, q); };
  const int full = (int)(K / CHUNK) * CHUNK;
  const bf16 *row = w + (i64)n0 * K, *xr = x + (i64)m0 * ldx;
  for (int k = 0; k < full; k += CHUNK) {
    __m512bh a[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      if (MR == 1) __builtin_prefetch(row + j * K + k + NR * K, 0, 2);
      a[j] = load(row + j * K + k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      __m512bh b = load(xr + (i64)i * ldx + k);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = add(acc[i][j], b, a[j]);
    }
  }
  if (full == K) return;
  const __mmask32 rest = (1u << (K - full)) - 1;
  for (int j = 0; j < NR; j++) {
    __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(rest, row + j * K + full);
    for (int i = 0; i < MR; i++) acc[i][j] = add(acc[i][j], load(xr + (i64)i * ldx + full), a);
  }
}
#endif
template <class W, int MR, int NR, class Store>
static inline void tile(const typename Input<W>::T* x, int ldx, const W* w, i64 K, int m0, int n0, const Store& store) {
  V acc[MR][NR] = {};
  accumulate(x, ldx, w, K, m0, n0, acc);
  constexpr int N = MR * NR, FOURS = N / 4 * 4;
#pragma GCC unroll 8
  for (int i = 0; i < FOURS; i += 4) {
    auto at = [&](int t) { return acc[(i + t) / NR][(i + t) % NR]; };
    float y[4];
    sum_lanes4(at(0), at(1), at(2), at(3), y);
    for (int t = 0; t < 4; t++) store(m0 + (i + t) / NR, n0 + (i + t) % NR, y[t]);
  }
#pragma GCC unroll 8
  for (int i = FOURS; i < N; i++) store(m0 + i / NR, n0 + i % NR, sum_lanes(acc[i / NR][i % NR]));
}

// Rows of x and of w that are multiplied at once, and rows of w where there is one row of x.
constexpr int TILE_M = TILE >= 20 ? 5 : 3, TILE_N = TILE >= 20 ? 4 : 2, TILE_ONE = TILE >= 20 ? 8 : 4;

// At most TILE_M rows of x times rows [n0, n1) of w.
template <class W, int MR, class Store>
static inline void strip_of(const typename Input<W>::T* x, int ldx, const W* w, i64 K, int m, int n0, int n1, const Store& store) {
  int j = n0;
  for (; j + TILE_N <= n1; j += TILE_N) tile<W, MR, TILE_N>(x, ldx, w, K, m, j, store);
  for (; j < n1; j++) tile<W, MR, 1>(x, ldx, w, K, m, j, store);
}
template <class W, class Store>
static inline void rows_of_tile(const typename Input<W>::T* x, int ldx, const W* w, i64 K, int m0, int m1, int n0, int n1, const Store& store) {
  switch (m1 - m0) {
    case TILE_M: strip_of<W, TILE_M>(x, ldx, w, K, m0, n0, n1, store); break;
#if defined(__AVX512F__)
    case 4: strip_of<W, 4>(x, ldx, w, K, m0, n0, n1, store); break;
    case 3: strip_of<W, 3>(x, ldx, w, K, m0, n0, n1, store); break;
#endif
    case 2: strip_of<W, 2>(x, ldx, w, K, m0, n0, n1, store); break;
    default: strip_of<W, 1>(x, ldx, w, K, m0, n0, n1, store); break;
  }
}

static inline void widen_rows(const i8* w, i64 count, Floats& to) {
  if (to.size() < (size_t)count) to.resize(count);
  i64 i = 0;
  for (; i + LANES <= count; i += LANES) storev(to.data() + i, load16(w + i));
  for (; i < count; i++) to[i] = to_float(w[i]);
}

// All M rows times w's rows [n.begin, n.end); `store(m, n, value)` receives each result once.
template <class W, class Store>
static void matmul(const typename Input<W>::T* x, int ldx, int M, const W* w, i64 K, Range n, const Store& store) {
  if (M == 1) {  // bandwidth-bound: several weight rows stream at once
    int j = n.begin;
    for (; j + TILE_ONE <= n.end; j += TILE_ONE) tile<W, 1, TILE_ONE>(x, ldx, w, K, 0, j, store);
    for (; j < n.end; j++) tile<W, 1, 1>(x, ldx, w, K, 0, j, store);
    return;
  }
  // As many rows as fit in `bytes`, in whole units: of x what stays in L2, of w what stays in L1.
  auto fit = [](i64 bytes, i64 row, int unit) {
    int rows = (int)(bytes / row) / unit * unit;
    return rows > unit ? rows : unit;
  };
  // Codes that several tiles use become floats once; the numbers are the same, and so are the bits of the result.
  const bool widen = std::is_same_v<W, i8> && M > TILE_M;
  const int block = fit(512 * 1024, (i64)sizeof(*x) * ldx, TILE_M);
  const int strip = fit(16 * 1024, K * (i64)(widen ? sizeof(float) : sizeof(W)), TILE_N);
  for (int m0 = 0; m0 < M; m0 += block) {
    const int m1 = m0 + block < M ? m0 + block : M;
    for (int n0 = n.begin; n0 < n.end; n0 += strip) {
      const int n1 = n0 + strip < n.end ? n0 + strip : n.end;
      const int tiles = (m1 - m0 + TILE_M - 1) / TILE_M;  // as even as can be: a last tile of one would idle
      auto begin = [&](int i) { return m0 + (m1 - m0) * i / tiles; };
      if constexpr (std::is_same_v<W, i8>) {
        if (widen) {
          static thread_local Floats wide;
          widen_rows(w + n0 * K, (n1 - n0) * K, wide);
          auto shifted = [&](int m, int j, float y) { store(m, n0 + j, y); };
          for (int i = 0; i < tiles; i++)
            rows_of_tile<float>(x, ldx, wide.data(), K, begin(i), begin(i + 1), 0, n1 - n0, shifted);
          continue;
        }
      }
      for (int i = 0; i < tiles; i++) rows_of_tile<W>(x, ldx, w, K, begin(i), begin(i + 1), n0, n1, store);
    }
  }
}
