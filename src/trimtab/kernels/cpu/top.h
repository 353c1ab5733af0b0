// Attention whose values lie far away: all keys are scored here, and of the values only those of each query
// head's largest probabilities are fetched, once for all heads of a group.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention.h"

// Scratch of one thread: a row's scores by head, who chose which key, and the rows fetched.
template <class Source> struct Top {
  Floats q, out, scores, weights, order;
  std::vector<uint8_t> chosen;
  std::vector<int> fetched;
  typename Source::Stage staged;
};

// Marks the `n` largest of x[0, count), the earlier of equals; -inf is never one of them.
static inline void mark_largest(const float* x, int count, int n, Floats& order, uint8_t* chosen) {
  float* o = order.data();
  for (int j = 0; j < count; j++) o[j] = x[j] == x[j] ? x[j] : -INFINITY;
  float least = -INFINITY;
  if (n < count) {
    std::nth_element(o, o + n - 1, o + count, [](float a, float b) { return a > b; });
    least = o[n - 1];
  }
  int equal = n;
  for (int j = 0; j < count; j++) equal -= x[j] > least;
  for (int j = 0; j < count; j++) {
    chosen[j] = x[j] > least || (x[j] == least && equal > 0);
    equal -= x[j] == least;
    if (x[j] == -INFINITY) chosen[j] = 0;
  }
}

// Row `i` of a span and KV head g: the softmax over all keys, the values of each head's `n` largest, which stay
// listed in w.fetched. The sums are taken as `attend_item` takes them, so `n` that reaches all keys gives its
// bits. `renormalize`: the chosen probabilities are made to sum to one.
template <class Source, class Put>
static void attend_top(const Paged& c, const Source& source, Top<Source>& w, const float* q, const i64* mask_at, int span,
                       int g, int i, int n, bool renormalize, const Put& put) {
  const int32_t* s = c.spans + span * 3;
  const int group = c.H / c.G, d = c.d, n_new = s[2] - s[1], base = held(c, s[0], g), row = s[1] + i;
  const Seen seen = visible(c, g, base, i, row, n_new);
  const int count = seen.hi, width = (count + PAGE - 1) / PAGE * PAGE;
  w.q.resize((size_t)MAX_ROWS * d);
  w.out.assign((size_t)(group + MAX_ROWS) * d, 0);  // tiles of fewer rows than their template's write behind the last
  w.weights.resize((size_t)MAX_ROWS * SUPER);
  w.order.resize(count);
  w.scores.resize((size_t)(group + MAX_ROWS) * width);
  w.chosen.assign((size_t)group * width, 0);
  const float *qp[MAX_ROWS], *pp[MAX_ROWS];
  float *sp[MAX_ROWS], *op[MAX_ROWS];
  std::vector<Row> rows(group);
  std::vector<float> kept(group);

  auto tiles = [&](const auto& work) {  // work(first head of the group, heads, rows of the template)
    for (int h0 = 0; h0 < group; h0 += MAX_ROWS) {
      const int R = group - h0 < MAX_ROWS ? group - h0 : MAX_ROWS;
      work(h0, R, R <= 8 ? R : 16);
    }
  };
  tiles([&](int h0, int R, int RT) {
    for (int r = 0; r < RT; r++) {
      const float* src = q + ((i64)row * c.H + g * group + h0 + (r < R ? r : R - 1)) * d;
      float* dst = w.q.data() + (i64)r * d;
      for (int k = 0; k < d; k++) dst[k] = src[k] * c.scale;
      qp[r] = dst;
    }
    for (int sb = 0; sb < count; sb += SUPER) {
      for (int r = 0; r < RT; r++) sp[r] = w.scores.data() + (i64)(h0 + r) * width + sb;
      source.scores(qp, RT, sb, (width - sb < SUPER ? width - sb : SUPER) / PAGE, sp);
    }
  });
  for (int h = 0; h < group; h++) {
    float* x = w.scores.data() + (i64)h * width;
    for (int j = seen.sinks; j < seen.lo; j++) x[j] = -INFINITY;
    for (int j = count; j < width; j++) x[j] = -INFINITY;
    if (c.mask)
      for (int j = base; j < count; j++)
        if (!c.mask[mask_at[span] + (i64)i * n_new + (j - base)]) x[j] = -INFINITY;
    mark_largest(x, count, n, w.order, w.chosen.data() + (i64)h * width);
  }
  w.fetched.clear();
  for (int j = 0; j < count; j++)
    for (int h = 0; h < group; h++)
      if (w.chosen[(i64)h * width + j]) {
        w.fetched.push_back(j);
        break;
      }

  size_t u = 0;
  for (int sb = 0; sb < count; sb += SUPER) {
    const int size = width - sb < SUPER ? width - sb : SUPER;
    size_t end = u;
    while (end < w.fetched.size() && w.fetched[end] < sb + size) end++;
    const int* fetched = w.fetched.data() + u;
    const int some = (int)(end - u);
    source.stage(fetched, some, w.staged);
    tiles([&](int h0, int R, int RT) {
      for (int r = 0; r < RT; r++) {
        const i64 head = h0 + r;
        op[r] = w.out.data() + head * d;
        float* weights = w.weights.data() + (i64)r * SUPER;
        pp[r] = weights;
        if (r >= R) {  // unused rows of the template repeat nothing; their results are not read
          memset(weights, 0, SUPER * sizeof(float));
          continue;
        }
        Row& state = rows[head];
        state.out = op[r];
        float* x = w.scores.data() + head * width + sb;
        const float before = state.m;
        take_scores(state, x, size, d);
        if (before != -INFINITY && state.m != before) kept[head] *= expf(before - state.m);
        for (int j = 0; j < some; j++) {
          const int key = fetched[j] - sb;
          weights[j] = w.chosen[head * width + sb + key] ? x[key] : 0;
          kept[head] += weights[j];
        }
      }
      Source::staged_values(w.staged, pp, RT, some, op);
    });
    u = end;
  }
  for (int h = 0; h < group; h++) {
    const float total = renormalize ? kept[h] : rows[h].l, inv = total > 0 ? 1.0f / total : 0.0f;
    float* out = w.out.data() + (i64)h * d;
    for (int k = 0; k < d; k++) out[k] *= inv;
    put(row, g * group + h, out, rows[h].l > 0 ? rows[h].m + logf(rows[h].l) : -INFINITY);
  }
}
