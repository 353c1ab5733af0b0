// The C functions that kernels/native.py calls. Every pointer is owned by the caller.
#include "attention.h"
#include "coded.h"
#include "evict.h"
#include "matmul.h"
#include "model.h"
#include "moments.h"
#include "sample.h"
#include "simd.h"
#include "team.h"
#include "top.h"

#define API extern "C" __attribute__((visibility("default")))
#ifndef TT_TYPE
#define TT_TYPE float  // float, bf16 or f16, with TT_INT8 or without: only what is used is compiled
#endif
typedef TT_TYPE E;  // of cache rows
#ifdef TT_INT8
typedef i8 Weight;
#else
typedef E Weight;
#endif

// Whether matmul inputs are rounded to the weights' type on the way in.
API int tt_rounds_inputs() { return sizeof(Input<Weight>::T) < sizeof(float); }
API void* tt_team_new(int threads) { return new Team(threads < 1 ? 1 : threads); }
API void tt_team_free(void* t) { delete (Team*)t; }
API void* tt_model_new(const Shape* s, void* team) { return new Model(*s, *(Team*)team); }
API void tt_model_free(void* m) { delete (Model*)m; }

API void tt_step(void* model, const Step* st, const Paged* c) {
  Model& m = *(Model*)model;
  m.step<Weight, E>(*st, *c);
}
API void tt_step_coded(void* model, const Step* st, const Coded* c) {
  Model& m = *(Model*)model;
  m.step<Weight, E>(*st, *c);
}
API void tt_embed(void* model, const i64* tokens, int n, float* out) {
  Model& m = *(Model*)model;
  m.team.run([&](int t) { m.embed<Weight>(t, tokens, n, out); });
}
API void tt_layer_in(void* model, int layer, int n, const float* x, float* q, float* k, float* v) {
  Model& m = *(Model*)model;
  m.layer_in<Weight>(m.s.layers[layer], n, x, q, k, v);
}
API void tt_layer_out(void* model, int layer, int n, float* x, const float* attn) {
  Model& m = *(Model*)model;
  m.layer_out<Weight>(m.s.layers[layer], n, x, attn);
}
API void tt_finish(void* model, const Step* st, const float* x) {
  Model& m = *(Model*)model;
  m.size(st->n);
  m.team.run([&](int t) { m.finish<Weight>(t, *st, x); });
}

API void tt_rotate(float* x, int n, int heads, int d, const float* cos, const float* sin) {
  for (int i = 0; i < n; i++) Model::rotate(x + (i64)i * heads * d, heads, d, cos + (i64)i * d / 2, sin + (i64)i * d / 2);
}
API void tt_write(const Paged* c, const float* k, const float* v, int n) {
  write_share<E>(*c, k, v, 0, n);
}
API void tt_write_coded(const Coded* c, const float* k, const float* v, int n) {
  write_share<E>(*c, k, v, 0, n);
}

static std::vector<i64> mask_offsets(const Paged& c) {
  std::vector<i64> at(c.n_spans + 1, 0);
  for (int i = 0; i < c.n_spans; i++) {
    i64 w = c.spans[i * 3 + 2] - c.spans[i * 3 + 1];
    at[i + 1] = at[i] + w * w;
  }
  return at;
}
template <class Held> static void attend_held(Team& tm, const Held& c, const float* q, float* out, float* lse) {
  auto at = mask_offsets(c);
  std::vector<Scratch> scratch(tm.size);
  for (auto& w : scratch) w.size(c.d);
  States states;
  SharedRuns runs;
  runs.find(c, states.begun);
  const bool shared = runs.any() && !c.window;
  if (shared) states.size(c, c.spans[c.n_spans * 3 - 1]);
  tm.next = 0;
  tm.run([&](int t) {
    auto source = [&](int seq, int g) { return source_of<E>(c, seq, g); };
    if (shared) attend_shared(tm, t, c, runs, source, scratch[t], states, q);
    attend_all(tm, c, source, scratch[t], states, q, at.data(), shared, [&](int row, int h, const float* o, float z) {
      i64 i = (i64)row * c.H + h;
      memcpy(out + i * c.d, o, c.d * sizeof(float));
      lse[i] = z;
    });
  });
}
// out [N, H, d], lse [N, H].
API void tt_attend(void* team, const Paged* c, const float* q, float* out, float* lse) {
  attend_held(*(Team*)team, *c, q, out, lse);
}
API void tt_attend_coded(void* team, const Coded* c, const float* q, float* out, float* lse) {
  attend_held(*(Team*)team, *c, q, out, lse);
}
// How many keys of each span lie in runs that it shares; returns the held keys that a layer reads, shared ones once.
API i64 tt_shared(const Paged* c, int32_t* begun) {
  std::vector<int> found;
  SharedRuns runs;
  runs.find(*c, found);
  i64 keys = 0;
  for (const auto& level : runs.levels)
    for (const auto& run : level) keys += (i64)(run.end - run.first) * SUPER;
  for (int s = 0; s < c->n_spans; s++) {
    begun[s] = found[s];
    keys += held(*c, c->spans[s * 3], 0) - found[s];
  }
  return keys;
}
// Joins segment b into segment a: out [n, d], logsumexp [n]. An empty segment (-inf) counts nothing.
API void tt_merge(int n, int d, float* out_a, float* lse_a, const float* out_b, const float* lse_b) {
  for (int i = 0; i < n; i++) {
    float top = lse_a[i] > lse_b[i] ? lse_a[i] : lse_b[i];
    if (top == -INFINITY) continue;
    float wa = expf(lse_a[i] - top), wb = expf(lse_b[i] - top), inv = 1.0f / (wa + wb);
    for (int j = 0; j < d; j++) {
      i64 at = (i64)i * d + j;
      out_a[at] = (wa * out_a[at] + wb * out_b[at]) * inv;
    }
    lse_a[i] = top + logf(wa + wb);
  }
}
// Codes keys up to k_to and values up to v_to ([layers, heads] each) of one sequence.
API void tt_code(void* team, const Coded* c, int seq, int n_layers, const int32_t* k_to, const int32_t* v_to, int many) {
  Team& tm = *(Team*)team;
  auto work = [&](int) {
    for (i64 i = tm.take(); i < (i64)n_layers * c->G; i = tm.take()) {
      Coded l = *c;
      for (i64 j = 0; j < i / c->G; j++) next_layer(l);
      code_rows<E>(l, seq, (int)(i % c->G), k_to[i], v_to[i]);
    }
  };
  tm.next = 0;
  if (many) tm.run(work);  // waking the others takes longer than coding a row
  else work(0);
}
template <class Held>
static void add_column_sums(Team& tm, const Held& c, const float* q, const float* lse, int row0, float* sums, i64 sums_span,
                            i64 sums_head) {
  auto at = mask_offsets(c);
  std::vector<Scratch> scratch(tm.size);
  for (auto& w : scratch) w.size(c.d);
  tm.next = 0;
  tm.run([&](int t) {
    for (i64 i = tm.take(); i < (i64)c.n_spans * c.G; i = tm.take()) {
      const int span = (int)(i / c.G), g = (int)(i % c.G);
      column_sums(c, source_of<E>(c, c.spans[span * 3], g), scratch[t], q, lse, at.data(), span, g, row0,
                  sums + span * sums_span + g * sums_head);
    }
  });
}
// `took(row, g, source, rows)` receives the rows whose values were fetched.
template <class Held, class Took>
static void attend_top_held(Team& tm, const Held& c, const float* q, int n, bool renormalize, float* out, float* lse,
                            const Took& took) {
  auto at = mask_offsets(c);
  std::vector<Top<decltype(source_of<E>(c, 0, 0))>> scratch(tm.size);
  tm.next = 0;
  tm.run([&](int t) {
    i64 want = tm.take(), first = 0;
    for (int span = 0; span < c.n_spans; span++) {
      const i64 items = (i64)(c.spans[span * 3 + 2] - c.spans[span * 3 + 1]) * c.G;
      for (; want < first + items; want = tm.take()) {
        const int i = (int)((want - first) / c.G), g = (int)((want - first) % c.G);
        const auto source = source_of<E>(c, c.spans[span * 3], g);
        attend_top(c, source, scratch[t], q, at.data(), span, g, i, n, renormalize, [&](int row, int h, const float* o, float z) {
          i64 to = (i64)row * c.H + h;
          memcpy(out + to * c.d, o, c.d * sizeof(float));
          lse[to] = z;
        });
        took(c.spans[span * 3 + 1] + i, g, source, scratch[t].fetched);
      }
      first += items;
    }
  });
}
// out [N, H, d] and lse [N, H] with the values of each head's `n` largest probabilities alone; fetched [N, G]: how many
// rows of values that took.
API void tt_attend_top(void* team, const Paged* c, const float* q, int n, int renormalize, float* out, float* lse,
                       int32_t* fetched) {
  attend_top_held(*(Team*)team, *c, q, n, renormalize != 0, out, lse,
                  [&](int row, int g, const auto&, const std::vector<int>& rows) { fetched[(i64)row * c->G + g] = (int)rows.size(); });
}
// fetched [N, G, 2]: how many coded rows, and how many in full.
API void tt_attend_top_coded(void* team, const Coded* c, const float* q, int n, int renormalize, float* out, float* lse,
                             int32_t* fetched) {
  attend_top_held(*(Team*)team, *c, q, n, renormalize != 0, out, lse,
                  [&](int row, int g, const auto& source, const std::vector<int>& rows) {
                    int32_t* to = fetched + ((i64)row * c->G + g) * 2;
                    to[0] = (int)(std::lower_bound(rows.begin(), rows.end(), source.v_done) - rows.begin());
                    to[1] = (int)rows.size() - to[0];
                  });
}
// Adds each held key's probability mass to sums[span * sums_span + g * sums_head + j].
API void tt_column_sums(void* team, const Paged* c, const float* q, const float* lse, int row0, float* sums, i64 sums_span,
                        i64 sums_head) {
  add_column_sums(*(Team*)team, *c, q, lse, row0, sums, sums_span, sums_head);
}
API void tt_column_sums_coded(void* team, const Coded* c, const float* q, const float* lse, int row0, float* sums,
                              i64 sums_span, i64 sums_head) {
  add_column_sums(*(Team*)team, *c, q, lse, row0, sums, sums_span, sums_head);
}
#include "per_layer_api.h"

// Adds to the scores of a step's rows what its queries [L, n, H, d] gave them, and drops the lowest: one Heavy a span.
API void tt_heavy(void* team, const Paged* c, int layers, int n, const float* q, const float* lse, const Heavy* each) {
  heavy_hitters<E>(*(Team*)team, *c, layers, n, q, lse, each);
}
// Adds n queries of every layer and head to their sums [L, H, d] and outer products [L, H, d, d].
API void tt_moments(void* team, const float* q, i64 layer, int n, int L, int H, int d, float* sum, float* outer) {
  moments(*(Team*)team, q, layer, n, L, H, d, sum, outer);
}

// y[m, n] = x[m, k] w[n, k]^T, int8 rows times `scale` [n], for tests of batch invariance.
API void tt_matmul(void* team, const float* x, int M, const void* w, const float* scale, int N, int K, float* y) {
  Team& tm = *(Team*)team;
  Rows rows;
  rows.size(M, K);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < K; j++) put<Weight>(rows.row<Weight>(i), j, x[(i64)i * K + j]);
  tm.run([&](int t) {
    matmul(rows.row<Weight>(0), rows.stride, M, (const Weight*)w, K, share(N, 8, t, tm.n),
           [&](int m, int n, float v) { y[(i64)m * N + n] = scaled<Weight>(v, scale, n); });
  });
}
// Draws a token for each of `count` rows of logits [vocab].
API void tt_sample(void* team, Draw* rows, int count, int vocab) {
  Team& tm = *(Team*)team;
  auto work = [&](int t, int threads) {
    static thread_local Candidates scratch;
    for (int i = t; i < count; i += threads) sample_row(rows[i], vocab, scratch);
  };
  if (count < 4) return work(0, 1);  // waking the others takes longer
  tm.run([&](int t) { work(t, tm.n); });
}
// Reads `bytes` once with all threads; the sum is returned so that no read can be dropped.
API float tt_read(void* team, const float* p, i64 count) {
  Team& tm = *(Team*)team;
  std::vector<float> part(tm.size, 0.0f);
  tm.run([&](int t) {
    // Eight streams a thread, fetched well ahead: one alone does not reach what memory can give.
    const i64 mine = count / tm.n / (8 * LANES) * LANES;
    const float* from = p + mine * 8 * t;
    V acc[8] = {};
    for (i64 i = 0; i < mine; i += LANES) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        __builtin_prefetch(from + j * mine + i + 2048, 0, 2);
        acc[j] += loadv(from + j * mine + i);
      }
    }
    V s = V{};
    for (int j = 0; j < 8; j++) s += acc[j];
    part[t] = sum_lanes(s);
  });
  float total = 0;
  for (float x : part) total += x;
  return total;
}
