// The codec of KVQuant: codes are places in a codebook of a layer, and what lies far out is kept as it is.
//
// K: a channel's range is fixed beforehand, and values beyond it go into a list of at most `k_most` for the 16
// tokens of a unit, first come, first served; what finds it full is clamped and counted. V: a token's range is
// that of its own values without the `v_side` largest and smallest, which are listed. A dense value is
// book[code] * half + middle of its range, a code the number of `edges` that the normalized value exceeds.
//
// K unit: blocks of codes (lanes are tokens), uint8 listed[16] and clamped[16], values E [k_most], channels
// uint16 [k_most], in order of tokens. V unit: blocks of codes (lanes are channels), f16 middle[16] and
// half[16], values E [16][2 * v_side], channels uint16 likewise.
#pragma once
#include <algorithm>

#include "codes.h"
#include "per_layer.h"

struct NuqSettings {  // mirrored in kernels/nuq.py; all float32
  const float* k_range;                             // [layers][low, high, middle, half][width]
  const float *k_edges, *k_book, *v_edges, *v_book;  // [layers][16]; edges beyond the last are infinite
  int32_t k_most, v_side;
};

static inline V look_up(V book, VU codes) {
#if defined(__AVX512F__)
  return (V)_mm512_permutexvar_ps((__m512i)codes, (__m512)book);
#elif defined(__AVX2__)  // eight places a permutation: the upper eight where bit 3 is set
  auto half = [&](auto c) {
    const __m256i at = (__m256i)c;
    return (V8)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)book.lo, at), _mm256_permutevar8x32_ps((__m256)book.hi, at),
                                (__m256)_mm256_slli_epi32(at, 28));
  };
  return V(half(codes.lo), half(codes.hi));
#else
  float from[LANES], to[LANES];
  storev(from, book);
  for (int i = 0; i < LANES; i++) to[i] = from[codes[i]];
  return loadv(to);
#endif
}

template <int BITS, class E> struct Nuq {
  static constexpr int BYTES = Codes<BITS>::BYTES;
  const int width, d, k_most, v_side;
  const float *low, *high, *middle, *half, *k_edges, *v_edges;
  const V k_book, v_book;
  Nuq(const PerLayer& p, int layer) : Nuq(p, *(const NuqSettings*)p.codec, layer) {}
  Nuq(const PerLayer& p, const NuqSettings& s, int layer)
      : width(p.G * p.d), d(p.d), k_most(s.k_most), v_side(s.v_side), low(s.k_range + (i64)layer * 4 * width),
        high(low + width), middle(high + width), half(middle + width), k_edges(s.k_edges + layer * LANES),
        v_edges(s.v_edges + layer * LANES), k_book(loadv(s.k_book + layer * LANES)),
        v_book(loadv(s.v_book + layer * LANES)) {}

  template <class Unit> Unit* rest(Unit* unit) const { return unit + width / LANES * BYTES; }
  static uint32_t code(float x, const float* edges) {
    uint32_t c = 0;
    for (uint32_t i = 0; i < Codes<BITS>::TOP; i++) c += x > edges[i];
    return c;
  }

  void keys(const char* unit, const int32_t* place, float* tile) const {
    for (int b = 0; b < width / LANES; b++)
      Codes<BITS>::each(unit + b * BYTES, [&](int i, VU c) {
        const int at = b * LANES + i;
        storev(tile + (place ? place[at] : at) * LANES, look_up(k_book, c) * half[at] + middle[at]);
      });
    const uint8_t* listed = (const uint8_t*)rest(unit);
    const E* x = (const E*)(listed + 2 * PAGE);
    const uint16_t* at = (const uint16_t*)(x + k_most);
    for (int t = 0; t < PAGE; t++)
      for (int i = 0; i < listed[t]; i++, x++, at++) tile[(place ? place[*at] : *at) * LANES + t] = to_float(*x);
  }
  void values(const char* unit, float* tile) const {
    const f16 *mid = (const f16*)rest(unit), *size = mid + PAGE;
    for (int b = 0; b < width / LANES; b++) {
      const int at = b * LANES;
      float* to = tile + (i64)at / d * PAGE * d + at % d;
      Codes<BITS>::each(unit + b * BYTES, [&](int t, VU c) {
        storev(to + t * d, look_up(v_book, c) * to_float(size[t]) + to_float(mid[t]));
      });
    }
    const E* x = (const E*)(size + PAGE);
    const uint16_t* at = (const uint16_t*)(x + PAGE * 2 * v_side);
    for (int t = 0; t < PAGE; t++)
      for (int i = 0; i < 2 * v_side; i++, x++, at++) tile[((i64)*at / d * PAGE + t) * d + *at % d] = to_float(*x);
  }

  void encode(char* ku, char* vu, int t, const float* k, const float* v) const {
    encode_key(ku, t, k);
    encode_value(vu, t, v);
  }
  void encode_key(char* unit, int t, const float* k) const {
    uint8_t *listed = (uint8_t*)rest(unit), *clamped = listed + PAGE;
    E* x = (E*)(clamped + PAGE);
    uint16_t* at = (uint16_t*)(x + k_most);
    int used = 0;
    for (int i = 0; i < t; i++) used += listed[i];
    for (int c = 0; c < width; c++) {
      if (k_most && (k[c] < low[c] || k[c] > high[c])) {
        if (used < k_most && listed[t] < 255) {
          from_float(k[c], x + used);
          at[used++] = (uint16_t)c;
          listed[t]++;
          continue;
        }
        clamped[t] += clamped[t] < 255;
      }
      const float z = half[c] > 0 ? (k[c] - middle[c]) / half[c] : 0.0f;
      Codes<BITS>::put(unit + c / LANES * BYTES, t, c % LANES, code(z, k_edges));
    }
  }
  void encode_value(char* unit, int t, const float* v) const {
    f16 *mid = (f16*)rest(unit), *size = mid + PAGE;
    E* x = (E*)(size + PAGE) + t * 2 * v_side;
    uint16_t* at = (uint16_t*)((E*)(size + PAGE) + PAGE * 2 * v_side) + t * 2 * v_side;
    // A number and its channel as one integer that sorts as the number does, then as the channel.
    static thread_local std::vector<i64> order;
    order.resize(width);
    for (int c = 0; c < width; c++) {
      int32_t bits;
      memcpy(&bits, v + c, 4);
      order[c] = (i64)(bits < 0 ? bits ^ 0x7fffffff : bits) * 65536 + c;
    }
    auto first = order.begin(), inner = first + v_side, outer = order.end() - v_side, last = order.end();
    auto list = [&](auto from, auto to) {
      std::sort(from, to);
      for (; from != to; from++) {
        *at = (uint16_t)(*from & 65535);
        from_float(v[*at++], x++);
      }
    };
    if (v_side) {
      std::nth_element(first, inner, last);
      std::nth_element(inner, outer, last);
      list(first, inner);
      list(outer, last);
    }
    auto ends = std::minmax_element(inner, outer);
    const float lo = v[*ends.first & 65535], hi = v[*ends.second & 65535];
    from_float((hi + lo) / 2, mid + t);
    from_float((hi - lo) / 2, size + t);
    const float m = to_float(mid[t]), h = to_float(size[t]);
    for (auto i = inner; i != outer; i++) {
      const int c = (int)(*i & 65535);
      const float z = h > 0 ? (v[c] - m) / h : 0.0f;
      Codes<BITS>::put(unit + c / LANES * BYTES, c % LANES, t, code(z, v_edges));
    }
  }
};
