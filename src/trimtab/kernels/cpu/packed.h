// Attention over keys and values of which the older part is packed to a few bits (KIVI).
//
// Four tables a sequence, each naming blocks that span all layers and heads:
//   k_full, v_full   16 tokens in the model's type: K [d, 16], V [16, d]
//   k_packed         `group` tokens of K: a scale and a zero for each channel (per-channel quantization)
//   v_packed         16 tokens of V: a scale and a zero for each token and `group` channels (per-token)
// Codes lie in 32-bit words so that sixteen codes used together are sixteen lanes: for K the lanes are tokens
// and a word holds consecutive channels; for V the lanes are channels and a word holds tokens. Constants are
// f16. Keys below k_done and values below v_done are packed; x = code * scale + zero.
#pragma once
#include "attention.h"

struct Packed {  // mirrored in kernels/packed.py
  char* arena;
  const int32_t *k_full, *v_full, *k_packed, *v_packed;  // [slots, table_seq] each
  const int32_t *k_done, *v_done;                        // [slots]
  i64 table_seq;
  i64 full_unit, k_unit, v_unit;  // bytes of one (layer, head) inside a block
  int32_t bits, group, layer, n_units;  // n_units: layers * heads
};

static inline int per_word(const Packed& p) { return 32 / p.bits; }
static inline char* unit(const Packed& p, const int32_t* table, int seq, int j, int head, int G, i64 bytes) {
  return p.arena + ((i64)table[seq * p.table_seq + j] * p.n_units + p.layer * G + head) * bytes;
}
// Inside a K unit: codes [group / 16][words of d][16], then scales [d], zeros [d].
static inline int k_words(const Packed& p, int d) { return (d + per_word(p) - 1) / per_word(p); }
static inline f16* k_constants(const Packed& p, char* u, int d) {
  return (f16*)(u + (i64)p.group / PAGE * k_words(p, d) * LANES * 4);
}
// Inside a V unit: codes [d / 16][words of 16 tokens][16], then scales [16][d / group], zeros likewise.
static inline int v_words(const Packed& p) { return (PAGE + per_word(p) - 1) / per_word(p); }
static inline f16* v_constants(const Packed& p, char* u, int d) { return (f16*)(u + (i64)d / LANES * v_words(p) * LANES * 4); }

struct Affine { float scale, zero; };
// Min-max constants of n values, rounded to f16 as they are stored.
template <class Get> static inline Affine fit(int n, int bits, f16* scale, f16* zero, const Get& get) {
  float lo = get(0), hi = lo;
  for (int i = 1; i < n; i++) {
    float x = get(i);
    lo = x < lo ? x : lo;
    hi = x > hi ? x : hi;
  }
  from_float((hi - lo) / (float)((1 << bits) - 1), scale);
  from_float(lo, zero);
  return {to_float(*scale), to_float(*zero)};
}
static inline uint32_t code(float x, Affine a, int bits) {
  if (!(a.scale > 0)) return 0;
  float q = nearbyintf((x - a.zero) / a.scale), top = (float)((1 << bits) - 1);
  return (uint32_t)(q < 0 ? 0 : (q > top ? top : q));
}

// Packs key group `i` (tokens [i * group, (i + 1) * group)) of one layer's one head.
template <class E> static void pack_keys(const Packed& p, const Paged& c, int seq, int h, int i) {
  const int d = c.d, n = p.group, cpw = per_word(p), nw = k_words(p, d);
  char* u = unit(p, p.k_packed, seq, i, h, c.G, p.k_unit);
  uint32_t* w = (uint32_t*)u;
  f16* k = k_constants(p, u, d);
  memset(w, 0, (size_t)n / PAGE * nw * LANES * 4);
  auto at = [&](int t, int ch) {
    const E* page = (const E*)unit(p, p.k_full, seq, (i * n + t) / PAGE, h, c.G, p.full_unit);
    return to_float(page[ch * PAGE + (i * n + t) % PAGE]);
  };
  for (int ch = 0; ch < d; ch++) {
    Affine a = fit(n, p.bits, k + ch, k + d + ch, [&](int t) { return at(t, ch); });
    for (int t = 0; t < n; t++)
      w[((t / PAGE) * nw + ch / cpw) * LANES + t % PAGE] |= code(at(t, ch), a, p.bits) << (ch % cpw * p.bits);
  }
}
// Packs value row `i` of one layer's one head.
template <class E> static void pack_values(const Packed& p, const Paged& c, int seq, int h, int i) {
  const int d = c.d, n = p.group, cpw = per_word(p), nw = v_words(p), t = i % PAGE;
  char* u = unit(p, p.v_packed, seq, i / PAGE, h, c.G, p.v_unit);
  uint32_t* w = (uint32_t*)u;
  f16* k = v_constants(p, u, d);
  if (t == 0) memset(w, 0, (size_t)d / LANES * nw * LANES * 4);
  const E* row = (const E*)unit(p, p.v_full, seq, i / PAGE, h, c.G, p.full_unit) + t * d;
  for (int g = 0; g < d / n; g++) {
    Affine a = fit(n, p.bits, k + t * (d / n) + g, k + PAGE * (d / n) + t * (d / n) + g,
                   [&](int j) { return to_float(row[g * n + j]); });
    for (int ch = g * n; ch < (g + 1) * n; ch++)
      w[((ch / LANES) * nw + t / cpw) * LANES + ch % LANES] |= code(to_float(row[ch]), a, p.bits) << (t % cpw * p.bits);
  }
}

// Stores the new rows of every span in full, K and V in pages of their own.
template <class E> static void write_halves(const Packed& p, const Paged& c, const float* k, const float* v) {
  for (int s = 0; s < c.n_spans; s++) {
    const int32_t* span = c.spans + s * 3;
    for (int r = span[1]; r < span[2]; r++)
      for (int g = 0; g < c.G; g++) {
        int at = held(c, span[0], g) + r - span[1];
        E* kp = (E*)unit(p, p.k_full, span[0], at / PAGE, g, c.G, p.full_unit);
        E* vp = (E*)unit(p, p.v_full, span[0], at / PAGE, g, c.G, p.full_unit) + (at % PAGE) * c.d;
        const float *kr = k + ((i64)r * c.G + g) * c.d, *vr = v + ((i64)r * c.G + g) * c.d;
        for (int i = 0; i < c.d; i++) from_float(kr[i], kp + i * PAGE + at % PAGE);
        for (int i = 0; i < c.d; i++) from_float(vr[i], vp + i);
      }
  }
}

// Codes `shift` bits up in sixteen words, as floats.
static inline V unpack(const uint32_t* w, int shift, uint32_t mask) {
  VU u = *(const VUunaligned*)w;
  return __builtin_convertvector((VI)((u >> shift) & mask), V);
}

// Scores of 16 packed tokens: codes times (q * scale), plus q * zero which is the same for all of them.
template <class E, int R>
static void packed_scores(const uint32_t* w, int d, int bits, const float (*qs)[512], const float* qz, float* const* s,
                          int at) {
  const int cpw = 32 / bits;
  const uint32_t mask = (1u << bits) - 1;
  V acc[R] = {};
  for (int i = 0; i < d; i++) {
    V x = unpack(w + (i / cpw) * LANES, i % cpw * bits, mask);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r] += x * qs[r][i];
  }
  for (int r = 0; r < R; r++) storev(s[r] + at, acc[r] + qz[r]);
}
// out += sum over packed tokens [j0, j1) of one page, weights in p.
template <class E, int R>
static void packed_values(const Packed& pk, const uint32_t* w, const f16* k, int d, const float* const* p, int at, int j0,
                          int j1, float* const* out) {
  const int cpw = per_word(pk), nw = v_words(pk), groups = d / pk.group;
  const uint32_t mask = (1u << pk.bits) - 1;
  float ps[R][PAGE], pz[R];
  for (int g = 0; g < groups; g++) {
    for (int r = 0; r < R; r++) {
      pz[r] = 0;
      for (int j = j0; j < j1; j++) {
        ps[r][j] = p[r][at + j] * to_float(k[j * groups + g]);
        pz[r] += p[r][at + j] * to_float(k[PAGE * groups + j * groups + g]);
      }
    }
    for (int c = g * pk.group / LANES; c < (g + 1) * pk.group / LANES; c++) {
      V acc[R];
      for (int r = 0; r < R; r++) acc[r] = loadv(out[r] + c * LANES) + pz[r];
      for (int j = j0; j < j1; j++) {
        V x = unpack(w + (c * nw + j / cpw) * LANES, j % cpw * pk.bits, mask);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[r] += x * ps[r][j];
      }
      for (int r = 0; r < R; r++) storev(out[r] + c * LANES, acc[r]);
    }
  }
}

template <class E> struct PackedSource {
  const Packed& p;
  const Paged& c;
  int seq, g, k_done, v_done;
  PackedSource(const Packed& pk, const Paged& paged, int s, int head)
      : p(pk), c(paged), seq(s), g(head), k_done(pk.k_done[s]), v_done(pk.v_done[s]) {}

  void scores(const float* const* q, int R, int sb, int n_pages, float* const* s) const {
    int packed = (k_done - sb) / PAGE;  // k_done is a multiple of the group, so of a page
    packed = packed < 0 ? 0 : (packed > n_pages ? n_pages : packed);
    float qs[MAX_ROWS][512], qz[MAX_ROWS];
    int scaled = -1;
    for (int i = 0; i < packed; i++) {
      int token = sb + i * PAGE, group = token / p.group;
      char* u = unit(p, p.k_packed, seq, group, g, c.G, p.k_unit);
      const f16* k = k_constants(p, u, c.d);
      if (group != scaled) {
        scaled = group;
        for (int r = 0; r < R; r++) {
          qz[r] = 0;
          for (int ch = 0; ch < c.d; ch++) {
            qs[r][ch] = q[r][ch] * to_float(k[ch]);
            qz[r] += q[r][ch] * to_float(k[c.d + ch]);
          }
        }
      }
      const uint32_t* w = (const uint32_t*)u + (i64)(token % p.group / PAGE) * k_words(p, c.d) * LANES;
      ROW_CASES(packed_scores, R, w, c.d, p.bits, qs, qz, s, i * PAGE)
    }
    const E* pages[SUPER / PAGE];
    for (int i = packed; i < n_pages; i++)
      pages[i - packed] = (const E*)unit(p, p.k_full, seq, sb / PAGE + i, g, c.G, p.full_unit);
    float* rest[MAX_ROWS];
    for (int r = 0; r < R; r++) rest[r] = s[r] + packed * PAGE;
    if (packed < n_pages) ROW_CASES(scores_of, R, q, pages, n_pages - packed, c.d, rest)
  }
  void values(const float* const* w, int R, int sb, int count, float* const* out) const {
    int packed = v_done - sb;
    packed = packed < 0 ? 0 : (packed > count ? count : packed);
    for (int j = 0; j < packed; j += PAGE) {
      char* u = unit(p, p.v_packed, seq, (sb + j) / PAGE, g, c.G, p.v_unit);
      int end = packed - j < PAGE ? packed - j : PAGE;
      ROW_CASES(packed_values, R, p, (const uint32_t*)u, v_constants(p, u, c.d), c.d, w, j, 0, end, out)
    }
    if (packed == count) return;
    const E* pages[SUPER / PAGE];
    for (int i = packed / PAGE; i * PAGE < count; i++)
      pages[i] = (const E*)unit(p, p.v_full, seq, sb / PAGE + i, g, c.G, p.full_unit);
    ROW_CASES(values_of, R, w, pages, packed, count, c.d, out)
  }
};
