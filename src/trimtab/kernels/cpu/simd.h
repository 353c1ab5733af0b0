// Sixteen float lanes, loads from f32 / bf16 / f16, exp, and sums in one fixed order.
//
// Everything is written with compiler vector extensions, so one source serves AVX-512, AVX2 and NEON.
// Activations are float32 throughout; only weights and cache rows are stored narrow.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef float Vunaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t VUunaligned __attribute__((vector_size(64), aligned(2), may_alias));
constexpr int LANES = 16;
constexpr int CHUNK = 32;  // a matmul consumes K in chunks of 32 = one even and one odd vector

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

static inline V splat(float x) { return x - V{}; }
static inline V loadv(const float* p) { return *(const Vunaligned*)p; }
static inline void storev(float* p, V x) { *(Vunaligned*)p = x; }

// Pairwise tree of halves: the one order in which sixteen lanes are ever added.
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));
static inline float sum_lanes(V x) {
  V8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  V4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
static inline float max_lanes(V x) {
  float m = x[0];
  for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
  return m;
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
static inline V load16(const bf16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  VU u;
  for (int i = 0; i < LANES; i++) u[i] = (uint32_t)p[i].bits << 16;
  return (V)u;
#endif
}
static inline V load16(const f16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  V r;
  for (int i = 0; i < LANES; i++) r[i] = to_float(p[i]);
  return r;
#endif
}

// Thirty-two consecutive weights as two vectors. For bf16 the two are the even and the odd elements
// (one shift and one mask), so the activations are laid out likewise by `slot` below.
static inline void load32(const float* p, V& a, V& b) { a = loadv(p); b = loadv(p + LANES); }
static inline void load32(const f16* p, V& a, V& b) { a = load16(p); b = load16(p + LANES); }
static inline void load32(const bf16* p, V& a, V& b) {
  VU u = *(const VUunaligned*)p;
  a = (V)(u << 16);
  b = (V)(u & 0xffff0000u);
}
template <class W> static inline int slot(int k) { return k; }
template <> inline int slot<bf16>(int k) {
  int c = k % CHUNK;
  return k - c + (c & 1 ? LANES + c / 2 : c / 2);
}
static inline int padded(int k) { return (k + CHUNK - 1) / CHUNK * CHUNK; }

// exp(x) for x <= 0 to about 2 ulp (Cody-Waite reduction, degree-6 polynomial); -inf gives 0.
static inline V exp_neg(V x) {
  const V lo = splat(-87.3f);
  VI dead = x < lo;
  x = x < lo ? lo : x;
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
  return dead ? V{} : y;
}
