// Small matrix products whose accumulators stay in registers, and threads over independent pieces of work.
#pragma once
#include <utility>

#include "simd.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

// Rows of a register tile: its ROWS x 16 accumulators and one row of B fill the registers.
constexpr int ROWS = NATIVE_LANES == 16 ? 12 : 6;

// f(i) for i < count on `threads` threads of torch's own pool; the i must not depend on each other.
template <class F> static inline void in_parallel(i64 count, int threads, F f) {
  if (threads > count) threads = (int)count;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (i64 i = 0; i < count; i++) f(i);
}

struct Span {
  i64 begin, end;
  bool empty() const { return begin >= end; }
};
static inline Span overlap(Span a, Span b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// A[m, k] stands at data[m * row + k * column]; a transposed matrix has row = 1.
struct Left {
  const float* data;
  i64 row, column;
};
// Columns of B in panels of sixteen: B[k, 16 p + j] stands at data[p * panel + k * row + j].
struct Right {
  const float* data;
  i64 row, panel;
};

// C[M, 16] (+)= A[M, depth] B[depth, 16], summed over k in ascending order.
template <int M, bool ADD>
static void tile(const float* a, i64 row, i64 column, const float* b, i64 b_row, i64 depth, float* c, i64 c_row) {
  V sums[M];
  for (int m = 0; m < M; m++) sums[m] = ADD ? loadv(c + m * c_row) : V{};
  for (i64 k = 0; k < depth; k++) {
    const V x = loadv(b + k * b_row);
    for (int m = 0; m < M; m++) sums[m] += x * a[m * row + k * column];
  }
  for (int m = 0; m < M; m++) storev(c + m * c_row, sums[m]);
}
typedef void (*Tile)(const float*, i64, i64, const float*, i64, i64, float*, i64);
template <bool ADD, int... M> static inline Tile tile_of(int rows, std::integer_sequence<int, M...>) {
  static const Tile tiles[] = {tile<M + 1, ADD>...};
  return tiles[rows - 1];
}

// C[rows, 16 panels] (+)= A B, where the rows [m, m + ROWS) need only the k and the columns that `depth(m, last)`
// and `width(m, last)` name; the rest of B counts as zero and the rest of C is left as it is.
template <bool ADD, class Depth, class Width>
static inline void product(Left a, Right b, int rows, int panels, float* c, i64 c_row, Depth depth, Width width) {
  for (int p = 0; p < panels; p++)
    for (int m = 0; m < rows; m += ROWS) {
      const int count = rows - m < ROWS ? rows - m : ROWS;
      const Span k = depth(m, m + count - 1);
      if (k.empty() || overlap(width(m, m + count - 1), {16 * p, 16 * p + 16}).empty()) continue;
      tile_of<ADD>(count, std::make_integer_sequence<int, ROWS>{})(
          a.data + m * a.row + k.begin * a.column, a.row, a.column, b.data + p * b.panel + k.begin * b.row, b.row,
          k.end - k.begin, c + m * c_row + 16 * p, c_row);
    }
}
