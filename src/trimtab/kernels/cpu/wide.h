// Vectors of sixteen lanes on any processor: V of float, VI of int32, VU of uint32.
//
// AVX-512 holds them in one register. Elsewhere they are pairs of pairs down to what a register holds: compilers
// keep wider vectors in memory and lose most of the speed. Operators work lane by lane; a cast between the three
// keeps the bits.
#pragma once
#include <type_traits>

template <class T, int N> struct Register { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
template <class T, int N> struct Loose { typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(2), may_alias)); };

#if defined(__AVX512F__)
constexpr int NATIVE_LANES = 16;
#elif defined(__AVX__)
constexpr int NATIVE_LANES = 8;
#else
constexpr int NATIVE_LANES = 4;
#endif

template <class T, int N> struct Pair;
template <class T, int N>
using Wide = typename std::conditional_t<(N > NATIVE_LANES), std::common_type<Pair<T, N>>, Register<T, N>>::type;

template <class T, int N> struct Pair {
  typedef Wide<T, N / 2> Half;
  Half lo, hi;
  Pair() = default;
  Pair(const Half& a, const Half& b) : lo(a), hi(b) {}
  template <class U> explicit Pair(const Pair<U, N>& x) : lo((Half)x.lo), hi((Half)x.hi) {}
  T operator[](int i) const { return i < N / 2 ? lo[i] : hi[i - N / 2]; }
};
#define PAIR template <class T, int N> static inline __attribute__((always_inline))
#define PAIR_OPERATOR(OP)                                                                                       \
  PAIR Pair<T, N> operator OP(const Pair<T, N>& a, const Pair<T, N>& b) { return {a.lo OP b.lo, a.hi OP b.hi}; } \
  PAIR Pair<T, N> operator OP(const Pair<T, N>& a, std::common_type_t<T> b) { return {a.lo OP b, a.hi OP b}; }   \
  PAIR Pair<T, N> operator OP(std::common_type_t<T> a, const Pair<T, N>& b) { return {a OP b.lo, a OP b.hi}; }   \
  PAIR Pair<T, N>& operator OP##=(Pair<T, N>& a, const Pair<T, N>& b) { return a = a OP b; }                     \
  PAIR Pair<T, N>& operator OP##=(Pair<T, N>& a, std::common_type_t<T> b) { return a = a OP b; }
PAIR_OPERATOR(+)
PAIR_OPERATOR(-)
PAIR_OPERATOR(*)
PAIR_OPERATOR(/)
PAIR_OPERATOR(&)
PAIR_OPERATOR(|)
PAIR_OPERATOR(^)
#undef PAIR_OPERATOR
PAIR Pair<T, N> operator<<(const Pair<T, N>& a, int n) { return {a.lo << n, a.hi << n}; }
PAIR Pair<T, N> operator>>(const Pair<T, N>& a, int n) { return {a.lo >> n, a.hi >> n}; }
PAIR Pair<T, N> operator-(const Pair<T, N>& a) { return {-a.lo, -a.hi}; }
PAIR Pair<T, N> operator~(const Pair<T, N>& a) { return {~a.lo, ~a.hi}; }
#define PAIR_COMPARISON(OP)                                                                                          \
  PAIR Pair<int32_t, N> operator OP(const Pair<T, N>& a, const Pair<T, N>& b) { return {a.lo OP b.lo, a.hi OP b.hi}; } \
  PAIR Pair<int32_t, N> operator OP(const Pair<T, N>& a, std::common_type_t<T> b) { return {a.lo OP b, a.hi OP b}; }
PAIR_COMPARISON(<)
PAIR_COMPARISON(>)
PAIR_COMPARISON(>=)
#undef PAIR_COMPARISON

typedef Wide<float, 16> V;
typedef Wide<int32_t, 16> VI;
typedef Wide<uint32_t, 16> VU;
typedef Wide<float, 8> V8;
typedef Wide<float, 4> V4;

// Lane by lane a where the mask is set (all bits), else b.
template <class M, class X> static inline __attribute__((always_inline)) X select(const M& m, const X& a, const X& b) {
  return m ? a : b;
}
PAIR Pair<T, N> select(const Pair<int32_t, N>& m, const Pair<T, N>& a, const Pair<T, N>& b) {
  return {select(m.lo, a.lo, b.lo), select(m.hi, a.hi, b.hi)};
}

// Any alignment, any type in memory.
template <class X> static inline __attribute__((always_inline)) X load_wide(const void* p) {
  if constexpr (std::is_class_v<X>) {
    typedef decltype(X::lo) Half;
    return X(load_wide<Half>(p), load_wide<Half>((const char*)p + sizeof(Half)));
  } else {
    typedef std::remove_cv_t<std::remove_reference_t<decltype(X{}[0])>> T;
    return *(const typename Loose<T, sizeof(X) / sizeof(T)>::type*)p;
  }
}
template <class X> static inline __attribute__((always_inline)) void store_wide(void* p, const X& x) {
  if constexpr (std::is_class_v<X>) {
    store_wide(p, x.lo);
    store_wide((char*)p + sizeof(x.lo), x.hi);
  } else {
    typedef std::remove_cv_t<std::remove_reference_t<decltype(X{}[0])>> T;
    *(typename Loose<T, sizeof(X) / sizeof(T)>::type*)p = x;
  }
}

template <class X> static inline __attribute__((always_inline)) auto low_half(const X& x) {
  if constexpr (std::is_class_v<X>) return x.lo;
#if defined(__AVX512F__)
  else if constexpr (sizeof(X) == 64) return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
  else return __builtin_shufflevector(x, x, 0, 1, 2, 3);
}
template <class X> static inline __attribute__((always_inline)) auto high_half(const X& x) {
  if constexpr (std::is_class_v<X>) return x.hi;
#if defined(__AVX512F__)
  else if constexpr (sizeof(X) == 64) return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
  else return __builtin_shufflevector(x, x, 4, 5, 6, 7);
}

// Integers below 2^31 as floats.
template <class X> static inline __attribute__((always_inline)) auto floats_of(const X& x) {
  if constexpr (std::is_class_v<X>) return Pair<float, (int)(sizeof(X) / 4)>(floats_of(x.lo), floats_of(x.hi));
  else {
    typedef typename Register<float, sizeof(X) / 4>::type F;
    typedef typename Register<int32_t, sizeof(X) / 4>::type I;
    return __builtin_convertvector((I)x, F);
  }
}
// Sixteen 16-bit integers from anywhere in memory.
static inline VU load_u16(const void* p) {
#if defined(__AVX512F__)
  return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const __m128i* h = (const __m128i*)p;
  typedef Wide<uint32_t, 8> Half;
  return VU((Half)_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), (Half)_mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1)));
#else
  uint16_t narrow[16];
  uint32_t wide[16];
  memcpy(narrow, p, sizeof(narrow));
  for (int i = 0; i < 16; i++) wide[i] = narrow[i];
  return load_wide<VU>(wide);
#endif
}
// Sixteen 8-bit integers from anywhere in memory.
static inline VI load_i8(const void* p) {
#if defined(__AVX512F__)
  return (VI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const char* b = (const char*)p;
  typedef Wide<int32_t, 8> Half;
  return VI((Half)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)b)), (Half)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(b + 8))));
#else
  int8_t narrow[16];
  int32_t wide[16];
  memcpy(narrow, p, sizeof(narrow));
  for (int i = 0; i < 16; i++) wide[i] = narrow[i];
  return load_wide<VI>(wide);
#endif
}
