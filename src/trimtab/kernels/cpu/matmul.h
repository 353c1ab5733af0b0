// y[m, n] = sum_k x[m, k] * w[n, k] with w row-major exactly as in the checkpoint (nothing is repacked).
//
// Batch invariance: every output element is one accumulator of sixteen lanes that walks k in ascending
// chunks, then one fixed tree sum. Tile sizes, thread count and the number of rows never change that order,
// so a row's result is bit-identical whatever else is in the batch.
#pragma once
#include "simd.h"

// MR rows of x (prepared layout, stride ldx) times NR rows of w.
template <class W, int MR, int NR, class Store>
static inline void tile(const float* x, int ldx, const W* w, i64 K, int m0, int n0, const Store& store) {
  V acc[MR][NR] = {};
  const int full = (int)(K / CHUNK) * CHUNK;
  const W* row[NR];
  for (int j = 0; j < NR; j++) row[j] = w + (i64)(n0 + j) * K;
  const float* xr = x + (i64)m0 * ldx;
  for (int k = 0; k < full; k += CHUNK) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      V a, b;
      if (MR == 1) __builtin_prefetch((const char*)(row[j] + k) + 1024);
      load32(row[j] + k, a, b);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        acc[i][j] += loadv(xr + (i64)i * ldx + k) * a;
        acc[i][j] += loadv(xr + (i64)i * ldx + k + LANES) * b;
      }
    }
  }
  if (full < K) {
    for (int j = 0; j < NR; j++) {
      W tail[CHUNK] = {};
      memcpy((void*)tail, row[j] + full, (K - full) * sizeof(W));
      V a, b;
      load32(tail, a, b);
      for (int i = 0; i < MR; i++) {
        acc[i][j] += loadv(xr + (i64)i * ldx + full) * a;
        acc[i][j] += loadv(xr + (i64)i * ldx + full + LANES) * b;
      }
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) store(m0 + i, n0 + j, sum_lanes(acc[i][j]));
}

template <class W, int NR, class Store>
static inline void rows_of_tile(const float* x, int ldx, const W* w, i64 K, int m0, int m1, int n0, const Store& store) {
  int m = m0;
  for (; m + 5 <= m1; m += 5) tile<W, 5, NR>(x, ldx, w, K, m, n0, store);
  switch (m1 - m) {
    case 4: tile<W, 4, NR>(x, ldx, w, K, m, n0, store); break;
    case 3: tile<W, 3, NR>(x, ldx, w, K, m, n0, store); break;
    case 2: tile<W, 2, NR>(x, ldx, w, K, m, n0, store); break;
    case 1: tile<W, 1, NR>(x, ldx, w, K, m, n0, store); break;
  }
}

// All M rows times w's rows [n.begin, n.end); `store(m, n, value)` receives each result once.
template <class W, class Store>
static void matmul(const float* x, int ldx, int M, const W* w, i64 K, Range n, const Store& store) {
  if (M == 1) {  // bandwidth-bound: eight weight rows stream at once
    int j = n.begin;
    for (; j + 8 <= n.end; j += 8) tile<W, 1, 8>(x, ldx, w, K, 0, j, store);
    for (; j < n.end; j++) tile<W, 1, 1>(x, ldx, w, K, 0, j, store);
    return;
  }
  int block = (int)(512 * 1024 / (4 * (i64)ldx)) / 5 * 5;  // rows of x that stay in L2
  if (block < 5) block = 5;
  for (int m0 = 0; m0 < M; m0 += block) {
    int m1 = m0 + block < M ? m0 + block : M, j = n.begin;
    for (; j + 4 <= n.end; j += 4) rows_of_tile<W, 4>(x, ldx, w, K, m0, m1, j, store);
    for (; j < n.end; j++) rows_of_tile<W, 1>(x, ldx, w, K, m0, m1, j, store);
  }
}
