// Sums of queries and of their outer products, for the mean and covariance of what a text asks.
//
// Every element is one chain over the rows in their order, so a text has the same bits in any steps and threads.
#pragma once
#include "simd.h"
#include "team.h"

// For each layer and head: sum [d] += q and outer [d, d] += q q^T over n rows; q [L, rows, H, d], `layer`
// elements a layer. Of the symmetric outer product only blocks of 16 columns that reach the diagonal are kept.
static void moments(Team& team, const float* q, i64 layer, int n, int L, int H, int d, float* sum, float* outer) {
  team.next = 0;
  team.run([&](int) {
    for (i64 at = team.take(); at < (i64)L * H; at = team.take()) {
      const float* rows = q + at / H * layer + at % H * d;
      float *s = sum + at * d, *o = outer + at * d * d;
      for (int i = 0; i < d; i++) {
        for (int j = i / LANES * LANES; j < d; j += LANES) {
          V acc = loadv(o + (i64)i * d + j);
          for (int r = 0; r < n; r++) acc += loadv(rows + (i64)r * H * d + j) * rows[(i64)r * H * d + i];
          storev(o + (i64)i * d + j, acc);
        }
      }
      for (int j = 0; j < d; j += LANES) {
        V acc = loadv(s + j);
        for (int r = 0; r < n; r++) acc += loadv(rows + (i64)r * H * d + j);
        storev(s + j, acc);
      }
    }
  });
}
