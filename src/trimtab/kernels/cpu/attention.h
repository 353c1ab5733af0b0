// Attention of new rows over paged keys and values, one output and one logsumexp per (row, query head).
//
// A page holds 16 tokens of one layer's one KV head: K as [d, 16] (so sixteen scores are one vector and no
// lane is ever summed across), then V as [16, d]. Tables of page numbers may be per sequence (`full`) or per
// sequence and head (eviction). Scores are taken in superblocks of 512 keys at absolute offsets with an
// online softmax between them, so a row's result does not depend on chunking or on its neighbours.
#pragma once
#include <vector>

#include "simd.h"
#include "team.h"

constexpr int PAGE = 16;
constexpr int SUPER = 512;
constexpr int MAX_ROWS = 16;

struct Paged {           // mirrored field by field in kernels/native.py
  void* arena;           // pages of 2 * 16 * d elements
  const int32_t* table;  // page numbers
  const int32_t* start;  // rows already held before this step, per (sequence, head) or per sequence
  const int32_t* spans;  // [n_spans, 3]: sequence, first row, one past the last row of this step
  const uint8_t* mask;   // optional visibility among new rows, spans' [n, n] squares one after another
  const int32_t* depth;  // optional: how many tokens of its own path a new row ends, itself included (trees)
  const int32_t* head_window;           // optional [G]: as `window`, head by head
  const int32_t* head_sinks;            // with it [G]: first keys that a row sees besides its window
  void* values;                         // optional: V lies in pages of its own, K's then being 16 * d elements
  const int32_t* value_table;           // with it: their numbers, laid out as `table`
  const float* q_sinks;                 // optional [N, H, d]: what asks those keys instead of q (other positions)
  i64 table_seq, table_head, table_layer;            // strides of `table`
  i64 page_mul, page_add, page_head, page_layer;     // page = table[...] * page_mul + page_add + head * page_head
  i64 start_seq, start_head, start_layer;            // strides of `start`
  int32_t n_spans, window, causal_new;  // window: keys a row may look back on, itself included; 0 = all
  int32_t fixed, ring;                  // ring > 0: table entries from `fixed` on are used again every `ring` pages
  int32_t share;                        // whether spans whose tables begin alike attend to that part together
  int32_t H, G, d;
  float scale;
};

static inline i64 page_of(const Paged& c, int seq, int g, int j) {
  if (c.ring && j >= c.fixed) j = c.fixed + (j - c.fixed) % c.ring;
  return (i64)c.table[seq * c.table_seq + g * c.table_head + j] * c.page_mul + c.page_add + g * c.page_head;
}
// The same rows one layer on.
static inline void next_layer(Paged& c) {
  c.table += c.table_layer;
  c.start += c.start_layer;
  c.page_add += c.page_layer;
  if (c.values) c.value_table += c.table_layer;
  if (c.head_window) c.head_window += c.G, c.head_sinks += c.G;
}
static inline int held(const Paged& c, int seq, int g) { return c.start[seq * c.start_seq + g * c.start_head]; }

template <class E> static inline E* page_ptr(const Paged& c, i64 page) {
  return (E*)c.arena + page * (c.values ? 1 : 2) * PAGE * c.d;
}
// The values of page index j.
template <class E> static inline E* value_ptr(const Paged& c, int seq, int g, int j) {
  if (!c.values) return page_ptr<E>(c, page_of(c, seq, g, j)) + PAGE * c.d;
  return (E*)c.values + (i64)c.value_table[seq * c.table_seq + g * c.table_head + j] * PAGE * c.d;
}

// Writes rows [r0, r1) of k and v (float [N, G, d]) of one span behind the rows held.
template <class E> static void write_rows(const Paged& c, const float* k, const float* v, int span, int r0, int r1) {
  const int32_t* s = c.spans + span * 3;
  for (int r = r0; r < r1; r++)
    for (int g = 0; g < c.G; g++) {
      int at = held(c, s[0], g) + r - s[1];
      E* page = page_ptr<E>(c, page_of(c, s[0], g, at / PAGE));
      const float *kr = k + ((i64)r * c.G + g) * c.d, *vr = v + ((i64)r * c.G + g) * c.d;
      for (int i = 0; i < c.d; i++) from_float(kr[i], page + i * PAGE + at % PAGE);
      E* vp = value_ptr<E>(c, s[0], g, at / PAGE) + (at % PAGE) * c.d;
      for (int i = 0; i < c.d; i++) from_float(vr[i], vp + i);
    }
}
// The same for whichever of rows [r0, r1) each span has.
template <class E, class Held> static void write_share(const Held& c, const float* k, const float* v, int r0, int r1) {
  for (int s = 0; s < c.n_spans; s++) {
    int a = c.spans[s * 3 + 1], b = c.spans[s * 3 + 2];
    a = a > r0 ? a : r0;
    b = b < r1 ? b : r1;
    if (a < b) write_rows<E>(c, k, v, s, a, b);
  }
}

// scores of R queries against P pages: each score is one chain over the channels.
template <class E, int R, int P>
static inline void score_pages(const float* const* q, const E* const* pages, int d, V out[R][P]) {
  V acc[R][P] = {};
  for (int i = 0; i < d; i++) {
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
      V k = load16(pages[p] + i * PAGE);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][p] += k * q[r][i];
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) out[r][p] = acc[r][p];
}

// out[r, 16*c0 ..] += sum_j p[r, j] * v[j, ...] over keys [from, to), C vectors of channels at once.
template <class E, int R, int C>
static inline void weigh_values(const float* const* p, const E* const* pages, int from, int to, int d, int c0,
                                float* const* out) {
  V acc[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) acc[r][c] = loadv(out[r] + (c0 + c) * LANES);
  for (int j = from; j < to; j++) {
    const E* v = pages[j / PAGE] + (j % PAGE) * d + c0 * LANES;
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      V x = load16(v + c * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][c] += x * p[r][j];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) storev(out[r] + (c0 + c) * LANES, acc[r][c]);
}

// More than TILE rows are taken in parts as even as can be.
constexpr int first_part(int R) {
  const int parts = (R + TILE - 1) / TILE;
  return (R + parts - 1) / parts;
}
// How many vectors of each of R rows to accumulate at once.
constexpr int at_once(int R) { return R * 4 <= TILE ? 4 : (R * 3 <= TILE ? 3 : (R * 2 <= TILE ? 2 : 1)); }

template <class E, int R>
static void scores_of(const float* const* q, const E* const* pages, int n, int d, float* const* s) {
  if constexpr (R > TILE) {
    constexpr int A = first_part(R);
    scores_of<E, A>(q, pages, n, d, s);
    return scores_of<E, R - A>(q + A, pages, n, d, s + A);
  }
  constexpr int P = at_once(R);
  int p = 0;
  for (; p + P <= n; p += P) {
    V o[R][P];
    score_pages<E, R, P>(q, pages + p, d, o);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < P; i++) storev(s[r] + (p + i) * PAGE, o[r][i]);
  }
  for (; p < n; p++) {
    V o[R][1];
    score_pages<E, R, 1>(q, pages + p, d, o);
    for (int r = 0; r < R; r++) storev(s[r] + p * PAGE, o[r][0]);
  }
}
template <class E, int R>
static void values_of(const float* const* p, const E* const* pages, int from, int to, int d, float* const* out) {
  if constexpr (R > TILE) {
    constexpr int A = first_part(R);
    values_of<E, A>(p, pages, from, to, d, out);
    return values_of<E, R - A>(p + A, pages, from, to, d, out + A);
  }
  constexpr int C = at_once(R);
  int c = 0, n = d / LANES;
  for (; c + C <= n; c += C) weigh_values<E, R, C>(p, pages, from, to, d, c, out);
  for (; c < n; c++) weigh_values<E, R, 1>(p, pages, from, to, d, c, out);
}

// Sources are called a superblock at a time: inlining them gains nothing and doubles the compilation.
#define NOINLINE __attribute__((noinline))
#define ROW_CASES(F, R, ...)                                                                   \
  switch (R) {                                                                                 \
    case 1: F<E, 1>(__VA_ARGS__); break;   case 2: F<E, 2>(__VA_ARGS__); break;                \
    case 3: F<E, 3>(__VA_ARGS__); break;   case 4: F<E, 4>(__VA_ARGS__); break;                \
    case 5: F<E, 5>(__VA_ARGS__); break;   case 6: F<E, 6>(__VA_ARGS__); break;                \
    case 7: F<E, 7>(__VA_ARGS__); break;   case 8: F<E, 8>(__VA_ARGS__); break;                \
    default: F<E, 16>(__VA_ARGS__); break;                                                     \
  }

// Scratch of one thread; sized once per step.
struct Scratch {
  Floats q, s, out, q_sinks, s_sinks;
  void size(int d) {
    q.resize((size_t)MAX_ROWS * d);
    q_sinks.resize((size_t)MAX_ROWS * d);
    s_sinks.resize((size_t)MAX_ROWS * SUPER);
    out.resize((size_t)MAX_ROWS * d);
    s.resize((size_t)MAX_ROWS * SUPER);
  }
};

// Where a superblock's scores and values come from; `CodedSource` (coded.h) is another one.
template <class E> struct PagedSource {
  const Paged& c;
  int seq, g;
  NOINLINE void scores(const float* const* q, int R, int sb, int n_pages, float* const* s) const {
    const E* pages[SUPER / PAGE];
    for (int p = 0; p < n_pages; p++) pages[p] = page_ptr<E>(c, page_of(c, seq, g, sb / PAGE + p));
    ROW_CASES(scores_of, R, q, pages, n_pages, c.d, s)
  }
  NOINLINE void values(const float* const* p, int R, int sb, int count, float* const* out) const {
    const E* pages[SUPER / PAGE];
    for (int i = 0; i * PAGE < count; i++) pages[i] = value_ptr<E>(c, seq, g, sb / PAGE + i);
    ROW_CASES(values_of, R, p, pages, 0, count, c.d, out)
  }
  struct Stage {
    int d;
    std::vector<E, LineAllocator<E>> rows;
  };
  // Copies the values of rows[0, n), ascending ones of one superblock, out of their memory.
  void stage(const int* rows, int n, Stage& to) const {
    to.d = c.d;
    to.rows.resize((size_t)SUPER * c.d);
    for (int u = 0; u < n; u++)
      memcpy(to.rows.data() + (i64)u * c.d, value_ptr<E>(c, seq, g, rows[u] / PAGE) + rows[u] % PAGE * c.d, c.d * sizeof(E));
  }
  static void staged_values(const Stage& from, const float* const* p, int R, int n, float* const* out) {
    const E* pages[SUPER / PAGE];
    for (int i = 0; i * PAGE < n; i++) pages[i] = from.rows.data() + (i64)i * PAGE * from.d;
    ROW_CASES(values_of, R, p, pages, 0, n, from.d, out)
  }
};

template <class E> static inline PagedSource<E> source_of(const Paged& c, int seq, int g) { return {c, seq, g}; }

// The keys that a row sees: [0, sinks) and [lo, hi).
struct Seen { int sinks, lo, hi; };
// For head g of row `i` of a span, which is row `row` of the step.
static inline Seen visible(const Paged& c, int g, int base, int i, int row, int n_new) {
  Seen s;
  s.hi = c.causal_new ? base + i + 1 : base + n_new;
  const int end = c.depth ? base + c.depth[row] : s.hi;  // in a tree, siblings do not push the window on
  const int window = c.head_window ? c.head_window[g] : c.window;
  s.lo = window && end > window ? end - window : 0;
  s.sinks = c.head_window ? c.head_sinks[g] : 0;
  if (s.sinks >= s.lo) s.sinks = s.lo = 0;  // nothing lies in between
  return s;
}

// One row's running softmax over superblocks: the largest score so far, the sum of exponentials, and their
// mix of values in `out`, all relative to that score.
struct Row {
  float m = -INFINITY, l = 0;
  float* out;
};
// Takes in the scores x of one superblock and leaves their weights in x. `n` is a multiple of LANES.
static inline void take_scores(Row& row, float* x, int n, int d) {
  V top = splat(-INFINITY);
  for (int j = 0; j < n; j += LANES) {
    V y = loadv(x + j);
    top = larger(y, top);
  }
  const float peak = max_lanes(top);
  if (peak == -INFINITY) {  // nothing visible here: the row's state must not change by a bit
    memset(x, 0, n * sizeof(float));
    return;
  }
  const float next = peak > row.m ? peak : row.m;
  V total = V{}, shift = splat(next);
  for (int j = 0; j < n; j += LANES) {
    V y = exp_neg(loadv(x + j) - shift);
    storev(x + j, y);
    total += y;
  }
  if (row.m != -INFINITY && next != row.m) {
    const float fade = expf(row.m - next);
    row.l *= fade;
    for (int k = 0; k < d; k++) row.out[k] *= fade;
  }
  row.l += sum_lanes(total);
  row.m = next;
}

// Where the running softmax of rows that attended to a shared beginning waits: [N, H] of m, l and out [d].
struct States {
  Floats data;
  std::vector<int> begun;  // keys that each span's rows have taken in already
  void size(const Paged& c, int rows) {
    size_t want = (size_t)rows * c.H * (c.d + 2);
    if (data.size() < want) data.resize(want);
  }
  float* at(const Paged& c, int row, int h) { return data.data() + ((i64)row * c.H + h) * (c.d + 2); }
};

// One work item: query pairs [pair0, pair0 + R) of a span for KV head g; a pair is (row, head in the group).
// `put(row, head, out, lse)` receives each result.
template <class Source, class Put>
static void attend_item(const Paged& c, const Source& source, Scratch& w, States& states, const float* q,
                        const i64* mask_at, bool shared, int span, int g, int pair0, int R, const Put& put) {
  const int32_t* s = c.spans + span * 3;
  const int group = c.H / c.G, d = c.d, n_new = s[2] - s[1], base = held(c, s[0], g);
  const int RT = R <= 8 ? R : 16;  // lanes of the row template; unused rows repeat the last one
  const int begun = shared ? states.begun[span] : 0;
  const float *qp[MAX_ROWS], *pp[MAX_ROWS];
  float *sp[MAX_ROWS], *op[MAX_ROWS];
  const float* q2[MAX_ROWS];
  float* s2[MAX_ROWS];
  Row rows[MAX_ROWS];
  Seen seen[MAX_ROWS];
  int first = 1 << 30, last = 0, sinks = 0;
  for (int r = 0; r < RT; r++) {
    int pair = pair0 + (r < R ? r : R - 1), i = pair / group, head = g * group + pair % group;
    const float* src = q + ((i64)(s[1] + i) * c.H + head) * d;
    float* dst = w.q.data() + (i64)r * d;
    for (int k = 0; k < d; k++) dst[k] = src[k] * c.scale;
    qp[r] = dst;
    op[r] = rows[r].out = w.out.data() + (i64)r * d;
    pp[r] = sp[r] = w.s.data() + (i64)r * SUPER;
    if (c.q_sinks) {
      float* to = w.q_sinks.data() + (i64)r * d;
      const float* from = c.q_sinks + (src - q);
      for (int k = 0; k < d; k++) to[k] = from[k] * c.scale;
      q2[r] = to;
      s2[r] = w.s_sinks.data() + (i64)r * SUPER;
    }
    if (begun) {
      const float* state = states.at(c, s[1] + i, head);
      rows[r].m = state[0];
      rows[r].l = state[1];
      memcpy(op[r], state + 2, d * sizeof(float));
    } else {
      memset(op[r], 0, d * sizeof(float));
    }
    seen[r] = visible(c, g, base, i, s[1] + i, n_new);
    if (seen[r].lo < first) first = seen[r].lo;
    if (seen[r].hi > last) last = seen[r].hi;
    if (seen[r].sinks > sinks) sinks = seen[r].sinks;
  }
  for (int sb = sinks ? 0 : (first > begun ? first : begun) / SUPER * SUPER; sb < last; sb += SUPER) {
    if (sb >= sinks && sb + SUPER <= first) {  // between the sinks and every row's window
      sb = first / SUPER * SUPER - SUPER;
      continue;
    }
    const int count = last - sb < SUPER ? last - sb : SUPER, n_pages = (count + PAGE - 1) / PAGE;
    auto inside = [&](int key) { return key < sb ? 0 : (key - sb > n_pages * PAGE ? n_pages * PAGE : key - sb); };
    // Pages that no row sees may be gone: [gap, from) of this superblock.
    const int gap = (inside(sinks) + PAGE - 1) / PAGE, from = inside(first) / PAGE > gap ? inside(first) / PAGE : gap;
    auto parts = [&](auto f) {
      if (from == gap) return f(0, n_pages);
      if (gap) f(0, gap);
      if (from < n_pages) f(from, n_pages);
    };
    parts([&](int a, int b) {
      float* at[MAX_ROWS];
      for (int r = 0; r < RT; r++) at[r] = sp[r] + a * PAGE;
      source.scores(qp, RT, sb + a * PAGE, b - a, at);
    });
    if (c.q_sinks && gap) {
      source.scores(q2, RT, sb, gap, s2);
      for (int r = 0; r < RT; r++) memcpy(sp[r], s2[r], inside(seen[r].sinks) * sizeof(float));
    }
    for (int r = 0; r < RT; r++) {
      const int i = (pair0 + (r < R ? r : R - 1)) / group, b = inside(seen[r].hi);
      float* x = sp[r];
      for (int j = inside(seen[r].sinks); j < inside(seen[r].lo); j++) x[j] = -INFINITY;
      for (int j = b; j < n_pages * PAGE; j++) x[j] = -INFINITY;
      if (c.mask)
        for (int j = base > sb ? base - sb : 0; j < b; j++)
          if (!c.mask[mask_at[span] + (i64)i * n_new + (sb + j - base)]) x[j] = -INFINITY;
      take_scores(rows[r], x, n_pages * PAGE, d);
    }
    parts([&](int a, int b) {
      const float* at[MAX_ROWS];
      for (int r = 0; r < RT; r++) at[r] = pp[r] + a * PAGE;
      source.values(at, RT, sb + a * PAGE, (b * PAGE < count ? b * PAGE : count) - a * PAGE, op);
    });
  }
  for (int r = 0; r < R; r++) {
    const Row& row = rows[r];
    const int pair = pair0 + r;
    const float inv = row.l > 0 ? 1.0f / row.l : 0.0f;
    for (int k = 0; k < d; k++) op[r][k] *= inv;
    put(s[1] + pair / group, g * group + pair % group, op[r], row.l > 0 ? row.m + logf(row.l) : -INFINITY);
  }
}

// All items of the step, taken by threads from the team's counter. Call between two barriers.
// `source_of(sequence, head)` makes the source of an item. `shared`: rows go on from their `states`.
template <class SourceOf, class Put>
static void attend_all(Team& team, const Paged& c, const SourceOf& source_of, Scratch& w, States& states, const float* q,
                       const i64* mask_at, bool shared, const Put& put) {
  const int group = c.H / c.G;
  i64 want = team.take(), at = 0;
  for (int span = 0; span < c.n_spans; span++) {
    int pairs = (c.spans[span * 3 + 2] - c.spans[span * 3 + 1]) * group;
    int tiles = (pairs + MAX_ROWS - 1) / MAX_ROWS;
    i64 items = (i64)tiles * c.G;
    for (; want < at + items; want = team.take()) {
      int g = (int)((want - at) / tiles), t = (int)((want - at) % tiles);
      int left = pairs - t * MAX_ROWS;
      attend_item(c, source_of(c.spans[span * 3], g), w, states, q, mask_at, shared, span, g, t * MAX_ROWS,
                  left < MAX_ROWS ? left : MAX_ROWS, put);
    }
    at += items;
  }
}

// sums[g][j] += sum over the span's rows and the head group of p(row, j), given each row's logsumexp.
template <class Source>
static void column_sums(const Paged& c, const Source& source, Scratch& w, const float* q, const float* lse,
                        const i64* mask_at, int span, int g, int row0, float* sums) {
  const int32_t* s = c.spans + span * 3;
  const int group = c.H / c.G, d = c.d, n_new = s[2] - s[1], base = held(c, s[0], g);
  const float* qp = w.q.data();
  float* sp = w.s.data();
  for (int i = row0; i < n_new; i++) {
    const Seen see = visible(c, g, base, i, s[1] + i, n_new);
    const uint8_t* square = c.mask ? c.mask + mask_at[span] + (i64)i * n_new : nullptr;
    for (int h = g * group; h < (g + 1) * group; h++) {
      const float* src = q + ((i64)(s[1] + i) * c.H + h) * d;
      for (int k = 0; k < d; k++) w.q[k] = src[k] * c.scale;
      const V z = splat(lse[(i64)(s[1] + i) * c.H + h]);
      for (int sb = see.sinks ? 0 : see.lo / SUPER * SUPER; sb < see.hi; sb += SUPER) {
        if (sb >= see.sinks && sb + SUPER <= see.lo) continue;
        const int count = see.hi - sb < SUPER ? see.hi - sb : SUPER;
        source.scores(&qp, 1, sb, (count + PAGE - 1) / PAGE, &sp);
        for (int j = 0; j < count; j += LANES) {
          const V p = exp_neg(loadv(sp + j) - z);
          for (int t = sb + j; t < sb + j + LANES && t < see.hi; t++)
            if ((t >= see.lo || t < see.sinks) && !(square && t >= base && !square[t - base])) sums[t] += p[t - sb - j];
        }
      }
    }
  }
}
