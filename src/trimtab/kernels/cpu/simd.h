// Sixteen float lanes, loads from f32 / bf16 / f16 / int8, exp, and sums in one fixed order.
//
// Everything is written with compiler vector extensions, so one source serves AVX-512, AVX2 and NEON.
// Activations are float32; only weights and cache rows are stored narrow. One exception: processors that
// multiply bf16 pairs (AVX512-BF16) get the inputs of bf16 matmuls rounded to bf16, at twice the rate.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef int64_t i64;
constexpr int LANES = 16;
constexpr int CHUNK = 32;  // a matmul consumes K in chunks of 32 = one even and one odd vector

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct i8 { int8_t code; };  // of a weight; what it stands for is code * scale of its row

#include "wide.h"

// How many vectors of sixteen lanes may accumulate at once and stay in registers.
constexpr int TILE = NATIVE_LANES == 16 ? 20 : 6;

static inline V splat(float x) { return x - V{}; }
static inline V loadv(const float* p) { return load_wide<V>(p); }
static inline void storev(float* p, V x) { store_wide(p, x); }
static inline V larger(V a, V b) { return select(a > b, a, b); }

// Pairwise tree of halves: the one order in which sixteen lanes are ever added.
static inline float sum_lanes(V x) {
  V8 a = low_half(x) + high_half(x);
  V4 b = low_half(a) + high_half(a);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
// Four such sums at once, in the very same order.
static inline void sum_lanes4(V a, V b, V c, V d, float* out) {
#if defined(__AVX512F__)  // stage by stage the halves of two vectors share one
  V ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V x = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  V y = x + __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  V z = y + __builtin_shufflevector(y, y, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  out[0] = z[0];
  out[1] = z[4];
  out[2] = z[8];
  out[3] = z[12];
#else
  auto four = [](V x) {
    V8 h = low_half(x) + high_half(x);
    return low_half(h) + high_half(h);
  };
  const V4 p = four(a), q = four(b), r = four(c), s = four(d);
  // (x0 + x2, x1 + x3) of two vectors beside each other, then their sums.
  const V4 pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
  const V4 rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
  const V4 y = __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
  for (int i = 0; i < 4; i++) out[i] = y[i];
#endif
}
static inline float max_lanes(V x) {
  V8 a = low_half(x), b = high_half(x);
  a = select(a > b, a, b);
  V4 c = low_half(a), d = high_half(a);
  c = select(c > d, c, d);
  const float p = c[0] > c[1] ? c[0] : c[1], q = c[2] > c[3] ? c[2] : c[3];
  return p > q ? p : q;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t s = (x.bits & 0x8000u) << 16, e = (x.bits >> 10) & 31, m = x.bits & 0x3ff, u;
  if (e == 0) {
    float f = m * (1.0f / 16777216.0f);
    return s ? -f : f;
  }
  u = s | ((e == 31 ? 255 : e + 112) << 23) | (m << 13);
  float f;
  memcpy(&f, &u, 4);
  return f;
#endif
}
static inline float to_float(i8 x) { return x.code; }
static inline void from_float(float x, float* p) { *p = x; }
static inline void from_float(float x, bf16* p) {  // round to nearest even, NaN kept
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 64) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void from_float(float x, f16* p) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, 0);
#else
  _Float16 h = (_Float16)x;
  memcpy(&p->bits, &h, 2);
#endif
}

// Sixteen consecutive elements as floats.
static inline V load16(const float* p) { return loadv(p); }
static inline V load16(const bf16* p) { return (V)(load_u16(p) << 16); }
static inline V load16(const f16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return V((V8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), (V8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1)));
#else
  float r[LANES];
  for (int i = 0; i < LANES; i++) r[i] = to_float(p[i]);
  return loadv(r);
#endif
}
static inline V load16(const i8* p) { return floats_of(load_i8(p)); }

// Thirty-two consecutive weights as two vectors. For bf16 the two are the even and the odd elements
// (one shift and one mask), so the activations are laid out likewise by `Input` below.
static inline void load32(const float* p, V& a, V& b) { a = loadv(p); b = loadv(p + LANES); }
static inline void load32(const f16* p, V& a, V& b) { a = load16(p); b = load16(p + LANES); }
static inline void load32(const i8* p, V& a, V& b) { a = load16(p); b = load16(p + LANES); }
static inline void load32(const bf16* p, V& a, V& b) {
  VU u = load_wide<VU>(p);
  a = (V)(u << 16);
  b = (V)(u & 0xffff0000u);
}
// Fewer than thirty-two weights, the missing ones zero. Sixteen is the common case (K a multiple of 16).
template <class W> static inline void load_tail(const W* p, int count, V& a, V& b) {
  W rest[CHUNK] = {};
  memcpy((void*)rest, p, count * sizeof(W));
  load32(rest, a, b);
}
static inline void load_tail(const float* p, int count, V& a, V& b) {
  if (count != LANES) return load_tail<float>(p, count, a, b);
  a = loadv(p);
  b = V{};
}
#if defined(__AVX512F__)
static inline void load_tail(const bf16* p, int count, V& a, V& b) {
  if (count != LANES) return load_tail<bf16>(p, count, a, b);
  VU u = (VU)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  a = (V)(u << 16);
  b = (V)(u & 0xffff0000u);
}
#endif
// What activations a matmul with weights W takes, and the place of element k among them.
template <class W> struct Input {
  typedef float T;
  static int slot(int k) { return k; }
};
#if defined(__AVX512BF16__)
// The processor multiplies pairs of bf16 and adds in float32: inputs are rounded to bf16, in plain order.
template <> struct Input<bf16> {
  typedef bf16 T;
  static int slot(int k) { return k; }
};
#else
template <> struct Input<bf16> {  // even elements, then odd ones, as load32 delivers the weights
  typedef float T;
  static int slot(int k) {
    int c = k % CHUNK;
    return k - c + (c & 1 ? LANES + c / 2 : c / 2);
  }
};
#endif
template <class W> static inline void put(typename Input<W>::T* row, int k, float x) {
  from_float(x, row + Input<W>::slot(k));
}
static inline int padded(int k) { return (k + CHUNK - 1) / CHUNK * CHUNK; }

// Buffers start on a cache line: a 64-byte load that straddles two lines costs two.
template <class T> struct LineAllocator {
  typedef T value_type;
  LineAllocator() = default;
  template <class U> LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U> bool operator==(const LineAllocator<U>&) const { return true; }
};
typedef std::vector<float, LineAllocator<float>> Floats;

// exp(x) for x <= 0 to about 2 ulp (Cody-Waite reduction, degree-6 polynomial); -inf gives 0.
static inline V exp_neg(V x) {
  const V lo = splat(-87.3f);
  const VI dead = x < lo;
  x = select(dead, lo, x);
  V n = x * 1.44269504088896341f;
  V shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  V rounded = n + shifter;
  VI e = (VI)rounded - (VI)shifter;
  V k = rounded - shifter;
  V r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  V y = (p * (r * r) + r) + 1.0f;
  y = (V)((VI)y + (e << 23));
  return select(dead, V{}, y);
}
