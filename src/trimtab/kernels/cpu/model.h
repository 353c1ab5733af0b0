// One decoder step of a dense Llama-like model over N flattened rows, straight from the checkpoint's weights.
//
// Either the whole step runs in one call (`full` cache), or layer by layer with the attention left to a cache
// policy in between; both go through the same phases, so they give the same bits.
#pragma once
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "shared.h"
#include "team.h"

struct Layer {  // mirrored in kernels/native.py; absent parts are null
  const void *q, *k, *v, *o, *gate, *up, *down;
  const float *norm1, *norm2, *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias, *q_norm, *k_norm;
  const float *q_scale, *k_scale, *v_scale, *o_scale, *gate_scale, *up_scale, *down_scale;  // of int8 rows
  i64 window;
};
struct Shape {
  int32_t n_layers, D, I, H, G, d, vocab;
  float eps;
  const void *embed, *head;
  const float *norm, *embed_scale, *head_scale;
  const Layer* layers;
};
struct Step {
  const i64* tokens;
  const float *cos, *sin;      // [N, d / 2]
  const float *cos_sinks, *sin_sinks;  // optional: of the positions from which a window's sinks are asked
  const int32_t* logit_rows;   // rows whose logits are wanted
  float *logits, *hidden;      // [n_logits, vocab]; optional [N, D] after the final norm
  float *queries, *lse;        // optional [L, N, H, d] and [L, N, H]: what each layer asked, and its logsumexp
  int32_t n, n_logits, rotated;  // rotated: whether `queries` are wanted after rotary embedding
};

// Rows of activations in the layout matmul wants: stride padded to CHUNK, the tail zero.
struct Rows {
  Floats data;
  int stride = 0;
  void size(int n, int k) {
    stride = padded(k);
    if (data.size() < (size_t)n * stride) data.assign((size_t)n * stride, 0.0f);
  }
  template <class W> typename Input<W>::T* row(int i) { return (typename Input<W>::T*)data.data() + (i64)i * stride; }
};

static inline void rms_scale(const float* x, int n, float eps, const float* w, float* out) {
  V acc = V{};
  int i = 0;
  for (; i + LANES <= n; i += LANES) acc += loadv(x + i) * loadv(x + i);
  float ss = sum_lanes(acc);
  for (; i < n; i++) ss += x[i] * x[i];
  float s = 1.0f / sqrtf(ss / n + eps);
  for (i = 0; i < n; i++) out[i] = x[i] * s * w[i];
}

struct Model {
  Shape s;
  Team& team;
  Floats x, q, k, v, attn, gate, q_sinks;
  std::vector<Scratch> scratch;
  Rows in, mid, act;  // inputs of qkv and gate/up, of o, of down
  std::vector<i64> mask_at;
  States states;
  SharedRuns runs;

  Model(const Shape& shape, Team& t) : s(shape), team(t), scratch(t.size) {
    for (auto& w : scratch) w.size(s.d > 16 ? s.d : 16);
  }
  void size(int n) {
    auto grow = [&](Floats& b, i64 c) { if (b.size() < (size_t)(n * c)) b.resize(n * c); };
    grow(x, s.D); grow(q, s.H * s.d); grow(k, s.G * s.d); grow(v, s.G * s.d); grow(gate, 2 * s.I);
    in.size(n, s.D);
    mid.size(n, s.H * s.d);
    act.size(n, s.I);
  }

  template <class W> void embed(int t, const i64* tokens, int n, float* out) {
    Range r = share(n, 1, t, team.n);
    for (int i = r.begin; i < r.end; i++) {
      const W* e = (const W*)s.embed + tokens[i] * s.D;
      for (int j = 0; j < s.D; j++) out[(i64)i * s.D + j] = scaled<W>(to_float(e[j]), s.embed_scale, (int)tokens[i]);
    }
  }
  template <class W> void norm_into(int t, const float* x, int n, const float* w, Rows& out) {
    Range r = share(n, 1, t, team.n);
    Floats& tmp = scratch[t].s;
    if (tmp.size() < (size_t)s.D) tmp.resize(s.D);
    for (int i = r.begin; i < r.end; i++) {
      rms_scale(x + (i64)i * s.D, s.D, s.eps, w, tmp.data());
      auto o = out.row<W>(i);
      for (int j = 0; j < s.D; j++) put<W>(o, j, tmp[j]);
    }
  }
  // out[m, n] = matmul + bias over this thread's part of one weight inside a concatenation at `offset`.
  template <class W>
  void project(Range mine, int offset, int width, const void* w, const float* scale, const float* bias, Rows& a, int n,
               i64 K, float* out) {
    int b = mine.begin - offset, e = mine.end - offset;
    b = b < 0 ? 0 : b;
    e = e > width ? width : e;
    if (b >= e) return;
    matmul(a.row<W>(0), a.stride, n, (const W*)w, K, Range{b, e},
           [&](int m, int j, float y) {
             y = scaled<W>(y, scale, j);
             out[(i64)m * width + j] = bias ? y + bias[j] : y;
           });
  }
  template <class W> void qkv(int t, const Layer& l, int n, float* qo, float* ko, float* vo) {
    int nq = s.H * s.d, nk = s.G * s.d;
    Range mine = share(nq + 2 * nk, 8, t, team.n);
    project<W>(mine, 0, nq, l.q, l.q_scale, l.q_bias, in, n, s.D, qo);
    project<W>(mine, nq, nk, l.k, l.k_scale, l.k_bias, in, n, s.D, ko);
    project<W>(mine, nq + nk, nk, l.v, l.v_scale, l.v_bias, in, n, s.D, vo);
  }
  void head_norms(int t, const Layer& l, int n, float* qo, float* ko) {
    if (!l.q_norm) return;
    Range r = share(n, 1, t, team.n);
    for (int i = r.begin; i < r.end; i++) {
      for (int h = 0; h < s.H; h++) {
        float* p = qo + ((i64)i * s.H + h) * s.d;
        rms_scale(p, s.d, s.eps, l.q_norm, p);
      }
      for (int h = 0; h < s.G; h++) {
        float* p = ko + ((i64)i * s.G + h) * s.d;
        rms_scale(p, s.d, s.eps, l.k_norm, p);
      }
    }
  }
  static void rotate(float* x, int heads, int d, const float* cos, const float* sin) {
    int half = d / 2;
    for (int h = 0; h < heads; h++) {
      float *a = x + (i64)h * d, *b = a + half;
      for (int i = 0; i < half; i++) {
        float p = a[i], r = b[i];
        a[i] = p * cos[i] - r * sin[i];
        b[i] = r * cos[i] + p * sin[i];
      }
    }
  }
  template <class W> void out_proj(int t, const Layer& l, int n, float* x) {
    matmul(mid.row<W>(0), mid.stride, n, (const W*)l.o, (i64)s.H * s.d, share(s.D, 8, t, team.n),
           [&](int m, int j, float y) {
             y = scaled<W>(y, l.o_scale, j);
             x[(i64)m * s.D + j] += l.o_bias ? y + l.o_bias[j] : y;
           });
  }
  template <class W> void gate_up(int t, const Layer& l, int n) {
    Range r = share(s.I, 16, t, team.n);
    if (r.begin >= r.end) return;
    float *g = gate.data(), *u = g + (i64)n * s.I;
    matmul(in.row<W>(0), in.stride, n, (const W*)l.gate, s.D, r,
           [&](int m, int j, float y) {
             y = scaled<W>(y, l.gate_scale, j);
             g[(i64)m * s.I + j] = l.gate_bias ? y + l.gate_bias[j] : y;
           });
    matmul(in.row<W>(0), in.stride, n, (const W*)l.up, s.D, r,
           [&](int m, int j, float y) {
             y = scaled<W>(y, l.up_scale, j);
             u[(i64)m * s.I + j] = l.up_bias ? y + l.up_bias[j] : y;
           });
    for (int m = 0; m < n; m++) {
      auto o = act.row<W>(m);
      for (int j = r.begin; j < r.end; j += LANES) {
        int w = r.end - j < LANES ? r.end - j : LANES;
        float ga[LANES] = {}, up[LANES] = {};
        memcpy(ga, g + (i64)m * s.I + j, w * sizeof(float));
        memcpy(up, u + (i64)m * s.I + j, w * sizeof(float));
        const V a = loadv(ga), e = exp_neg(select(a < 0.0f, a, -a));
        const V sig = select(a < 0.0f, e, splat(1.0f)) / (e + 1.0f);
        storev(up, a * sig * loadv(up));
        for (int i = 0; i < w; i++) put<W>(o, j + i, up[i]);
      }
    }
  }
  template <class W> void down(int t, const Layer& l, int n, float* x) {
    matmul(act.row<W>(0), act.stride, n, (const W*)l.down, s.I, share(s.D, 8, t, team.n),
           [&](int m, int j, float y) {
             y = scaled<W>(y, l.down_scale, j);
             x[(i64)m * s.D + j] += l.down_bias ? y + l.down_bias[j] : y;
           });
  }
  template <class W> void mlp(int t, const Layer& l, int n, float* x) {
    norm_into<W>(t, x, n, l.norm2, in);
    team.barrier(t);
    gate_up<W>(t, l, n);
    team.barrier(t);
    down<W>(t, l, n, x);
    team.barrier(t);
  }
  template <class W> void head(int t, const Rows&, int n, float* logits) {
    matmul(in.row<W>(0), in.stride, n, (const W*)s.head, s.D, share(s.vocab, 8, t, team.n),
           [&](int m, int j, float y) { logits[(i64)m * s.vocab + j] = scaled<W>(y, s.head_scale, j); });
  }

  void find_masks(const Paged& c) {
    mask_at.assign(c.n_spans + 1, 0);
    for (int i = 0; i < c.n_spans; i++) {
      i64 w = c.spans[i * 3 + 2] - c.spans[i * 3 + 1];
      mask_at[i + 1] = mask_at[i] + w * w;
    }
  }

  // The whole step over weights W and rows in pages, whose elements have type E; some may be coded.
  template <class W, class E, class Held> void step(const Step& st, const Held& rows) {
    size(st.n);
    find_masks(rows);
    runs.find(rows, states.begun);
    if (runs.any()) states.size(rows, st.n);
    if (st.cos_sinks && q_sinks.size() < q.size()) q_sinks.resize(q.size());
    team.run([&](int t) {
      const int n = st.n;
      Held c = rows;
      c.q_sinks = st.cos_sinks ? q_sinks.data() : nullptr;
      embed<W>(t, st.tokens, n, x.data());
      team.barrier(t);
      for (int i = 0; i < s.n_layers; i++) {
        const Layer& l = s.layers[i];
        norm_into<W>(t, x.data(), n, l.norm1, in);
        team.barrier(t);
        qkv<W>(t, l, n, q.data(), k.data(), v.data());
        team.barrier(t);
        c.window = (int)l.window;
        head_norms(t, l, n, q.data(), k.data());
        Range r = share(n, 1, t, team.n);
        const i64 width = (i64)s.H * s.d;
        auto keep_queries = [&] {
          if (r.begin < r.end)
            memcpy(st.queries + ((i64)i * n + r.begin) * width, q.data() + r.begin * width, (r.end - r.begin) * width * sizeof(float));
        };
        if (st.queries && !st.rotated) keep_queries();
        for (int j = r.begin; j < r.end; j++) {
          if (c.q_sinks) {
            const i64 at = (i64)j * s.H * s.d;
            memcpy(q_sinks.data() + at, q.data() + at, (size_t)s.H * s.d * sizeof(float));
            rotate(q_sinks.data() + at, s.H, s.d, st.cos_sinks + (i64)j * s.d / 2, st.sin_sinks + (i64)j * s.d / 2);
          }
          rotate(q.data() + (i64)j * s.H * s.d, s.H, s.d, st.cos + (i64)j * s.d / 2, st.sin + (i64)j * s.d / 2);
          rotate(k.data() + (i64)j * s.G * s.d, s.G, s.d, st.cos + (i64)j * s.d / 2, st.sin + (i64)j * s.d / 2);
        }
        if (st.queries && st.rotated) keep_queries();
        write_share<E>(c, k.data(), v.data(), r.begin, r.end);
        team.barrier(t);
        auto source = [&](int seq, int g) { return source_of<E>(c, seq, g); };
        const bool shared = runs.any() && !l.window;
        if (shared) attend_shared(team, t, c, runs, source, scratch[t], states, q.data());
        attend_all(team, c, source, scratch[t], states, q.data(), mask_at.data(), shared, [&](int row, int h, const float* o, float z) {
          if (st.lse) st.lse[((i64)i * n + row) * s.H + h] = z;
          auto p = mid.row<W>(row);
          for (int j = 0; j < s.d; j++) put<W>(p, h * s.d + j, o[j]);
        });
        team.barrier(t);
        next_layer(c);
        out_proj<W>(t, l, n, x.data());
        team.barrier(t);
        mlp<W>(t, l, n, x.data());
      }
      finish<W>(t, st, x.data());
    });
  }
  // Final norm of every row (if asked) and logits of the chosen rows.
  template <class W> void finish(int t, const Step& st, const float* x) {
    if (st.hidden) {
      Range r = share(st.n, 1, t, team.n);
      for (int i = r.begin; i < r.end; i++)
        rms_scale(x + (i64)i * s.D, s.D, s.eps, s.norm, st.hidden + (i64)i * s.D);
    }
    Range r = share(st.n_logits, 1, t, team.n);
    Floats& tmp = scratch[t].s;
    if (tmp.size() < (size_t)s.D) tmp.resize(s.D);
    for (int i = r.begin; i < r.end; i++) {
      rms_scale(x + (i64)st.logit_rows[i] * s.D, s.D, s.eps, s.norm, tmp.data());
      for (int j = 0; j < s.D; j++) put<W>(in.row<W>(i), j, tmp[j]);
    }
    team.barrier(t);
    if (st.n_logits) head<W>(t, in, st.n_logits, st.logits);
    team.barrier(t);
  }
  template <class W> void layer_in(const Layer& l, int n, const float* x, float* qo, float* ko, float* vo) {
    size(n);
    team.run([&](int t) {
      norm_into<W>(t, x, n, l.norm1, in);
      team.barrier(t);
      qkv<W>(t, l, n, qo, ko, vo);
      team.barrier(t);
      head_norms(t, l, n, qo, ko);
    });
  }
  template <class W> void layer_out(const Layer& l, int n, float* x, const float* attn) {
    size(n);
    team.run([&](int t) {
      Range r = share(n, 1, t, team.n);
      int width = s.H * s.d;
      for (int i = r.begin; i < r.end; i++)
        for (int j = 0; j < width; j++) put<W>(mid.row<W>(i), j, attn[(i64)i * width + j]);
      team.barrier(t);
      out_proj<W>(t, l, n, x);
      team.barrier(t);
      mlp<W>(t, l, n, x);
    });
  }
};
