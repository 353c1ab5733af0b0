// Draws one token a row from its logits: mask, temperature, top-k, top-p, min-p, and the inverse of the
// cumulative distribution at a given number. The definitions are those of decoding/processors.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

struct Draw {  // of one row, mirrored in kernels/native_sampling.py
  const float* logits;   // [V]
  const uint32_t* mask;  // [ceil(V / 32)] words of allowed tokens, or null for all
  double u;              // in [0, 1)
  double top_p;
  float temperature, min_p;
  int32_t top_k;
  int32_t token;  // out; -1 where the logits are no numbers or nothing is allowed
  float largest;  // out: the largest allowed logit, NaN if one is NaN
};

// Scratch of one thread: candidates in ascending order of id, with their weights.
struct Candidates {
  Floats weights, order;
  std::vector<int32_t> ids;
  std::vector<double> sums;
};

constexpr int SUM_BLOCK = 256;

// The largest logit, NaN if there is one.
static inline float largest_of(const float* x, int n) {
  V top = splat(-INFINITY), odd = V{};
  int j = 0;
  for (; j + LANES <= n; j += LANES) {
    const V y = loadv(x + j);
    top = larger(top, y);
    odd = odd + (y - y);  // 0, or NaN from NaN and infinities
  }
  float best = max_lanes(top), sum = sum_lanes(odd);
  bool nan = false;
  for (; j < n; j++) {
    best = x[j] > best ? x[j] : best;
    nan |= x[j] != x[j];
  }
  if (sum != sum)
    for (int i = 0; i < n && !nan; i++) nan = x[i] != x[i];
  return nan ? NAN : best;
}

// Collects the allowed tokens' logits; returns their number.
static inline int allowed_of(const float* x, const uint32_t* mask, int n, Candidates& c) {
  int count = 0;
  for (int w = 0; w * 32 < n; w++) {
    uint32_t bits = mask[w];
    const int base = w * 32, left = n - base;
    if (left < 32) bits &= (1u << left) - 1;
    if (bits == 0xffffffffu) {
      for (int i = 0; i < 32; i++) c.ids[count + i] = base + i;
      memcpy(c.weights.data() + count, x + base, 32 * sizeof(float));
      count += 32;
      continue;
    }
    for (; bits; bits &= bits - 1) {
      const int id = base + __builtin_ctz(bits);
      c.ids[count] = id;
      c.weights[count++] = x[id];
    }
  }
  return count;
}

// Keeps candidates for which `keep(position)` holds.
template <class Keep> static inline int only(Candidates& c, int n, const Keep& keep) {
  int kept = 0;
  for (int j = 0; j < n; j++)
    if (keep(j)) {
      c.ids[kept] = c.ids[j];
      c.weights[kept++] = c.weights[j];
    }
  return kept;
}

static inline float nth(float* o, int n, int k) {
  std::nth_element(o, o + k - 1, o + n, [](float a, float b) { return a > b; });
  return o[k - 1];
}

// The k-th largest of w; `order` is room for as many. k groups of numbers have a largest one of at least the
// k-th largest of all groups' largest ones, so whatever is smaller need not be looked at.
static inline float kth_largest(const float* w, int n, int k, float* order) {
  constexpr int GROUP = 8;
  const int whole = n / (GROUP * LANES) * (GROUP * LANES);
  int some = 0;
  if (whole / GROUP >= 2 * k) {
    for (int j = 0; j < whole; j += GROUP * LANES) {
      V top = loadv(w + j);
      for (int i = 1; i < GROUP; i++) top = larger(top, loadv(w + j + i * LANES));
      storev(order + j / GROUP, top);
    }
    const float bound = nth(order, whole / GROUP, k);
    for (int j = 0; j < n; j++) {
      order[some] = w[j];
      some += w[j] >= bound;
    }
  } else {
    memcpy(order, w, n * sizeof(float));
    some = n;
  }
  return nth(order, some, k);
}

static inline int keep_top_p(Candidates& c, int n, double p) {
  double total = 0, rest = 0;
  for (int j = 0; j < n; j++) total += c.weights[j];
  // A token goes when it and everything less likely fit into 1 - p; tokens this unlikely fit all together.
  double allowance = (1.0 - p) * total;
  const double floor = allowance / n * (1 - 1e-12);  // below the mean, however small p is: one is left
  int some = 0;
  for (int j = 0; j < n; j++)
    if (c.weights[j] > floor) {
      c.order[some++] = c.weights[j];
      rest += c.weights[j];
    }
  allowance -= total - rest;
  // Few are kept as a rule: look for the edge among the largest ones only, then among more of them.
  float* o = c.order.data();
  double sum = 0;
  int most = 64;
  for (; most < some; most *= 4) {
    std::nth_element(o, o + most, o + some, [](float a, float b) { return a > b; });
    double head = 0;
    for (int j = 0; j < most; j++) head += o[j];
    sum = rest - head;
    if (sum <= allowance) break;
  }
  if (most >= some) most = some, sum = 0;
  std::sort(o, o + most);
  int gone = 0;
  for (; gone < most; gone++) {
    sum += o[gone];
    if (sum > allowance) break;
  }
  const int kept = most - gone > 1 ? most - gone : 1;
  const float edge = o[most - kept];
  int more = kept - (int)(o + most - std::upper_bound(o, o + most, edge));
  return only(c, n, [&](int j) { return c.weights[j] > edge || (c.weights[j] == edge && more-- > 0); });
}

// Position of the first running sum above u times the whole; never one of weight zero.
static inline int draw_from(Candidates& c, const float* w, int n, double u) {
  const int blocks = (n + SUM_BLOCK - 1) / SUM_BLOCK;
  c.sums.resize(blocks);
  double total = 0;
  for (int b = 0; b < blocks; b++) {
    double sum = 0;
    for (int j = b * SUM_BLOCK; j < n && j < (b + 1) * SUM_BLOCK; j++) sum += w[j];
    c.sums[b] = total += sum;
  }
  const double target = u * total;
  int b = 0;
  while (b + 1 < blocks && c.sums[b] <= target) b++;
  double sum = b ? c.sums[b - 1] : 0;
  int last = -1;
  for (int j = b * SUM_BLOCK; j < n && j < (b + 1) * SUM_BLOCK; j++) {
    if (w[j] > 0) last = j;
    sum += w[j];
    if (sum > target && w[j] > 0) return j;
  }
  for (int j = b * SUM_BLOCK; last < 0 && j-- > 0;)  // rounding left nothing here: the last one that adds something
    if (w[j] > 0) last = j;
  return last;
}

static inline void sample_row(Draw& r, int vocab, Candidates& c) {
  const size_t room = (size_t)vocab + 2 * LANES;
  if (c.weights.size() < room) {
    c.weights.resize(room);
    c.order.resize(room);
    c.ids.resize(room);
  }
  r.token = -1;
  const float whole = largest_of(r.logits, vocab);
  r.largest = whole;
  if (!std::isfinite(whole)) return;
  const float* x = r.logits;
  int n = vocab;
  float top = whole;
  const bool greedy = r.temperature == 0;
  if (r.mask) {
    n = allowed_of(r.logits, r.mask, vocab, c);
    x = c.weights.data();
    r.largest = top = n ? largest_of(x, n) : -INFINITY;
    if (!std::isfinite(top)) return;
  }
  if (greedy) {
    int j = 0;
    while (x[j] != top) j++;
    r.token = r.mask ? c.ids[j] : j;
    return;
  }
  const float cold = r.temperature < 1e-30f ? 1e-30f : r.temperature;
  float* w = c.weights.data();
  for (int j = 0; j < n; j += LANES) {  // behind the last there is room, and what is there is not read
    V y;
    if (j + LANES <= n) {
      y = loadv(x + j);
    } else {
      float end[LANES];
      for (int i = 0; i < LANES; i++) end[i] = j + i < n ? x[j + i] : -INFINITY;
      y = loadv(end);
    }
    y = y - splat(top);
    if (cold != 1.0f) y = y / splat(cold);
    storev(w + j, y);
  }
  const bool listed = r.mask || (r.top_k > 0 && r.top_k < n) || r.top_p < 1 || r.min_p > 0;
  if (listed && !r.mask)
    for (int j = 0; j < n; j++) c.ids[j] = j;
  if (r.top_k > 0 && r.top_k < n) {
    const float least = kth_largest(w, n, r.top_k, c.order.data());
    n = only(c, n, [&](int j) { return w[j] >= least; });
  }
  for (int j = 0; j < n; j += LANES) storev(w + j, exp_neg(loadv(w + j)));
  if (r.top_p < 1) n = keep_top_p(c, n, r.top_p);
  if (r.min_p > 0) {
    float most = 0;
    for (int j = 0; j < n; j++) most = w[j] > most ? w[j] : most;
    n = only(c, n, [&](int j) { return w[j] >= r.min_p * most; });
  }
  const int at = draw_from(c, w, n, r.u);
  r.token = listed ? c.ids[at] : at;
}
