// A block of 16 x 16 codes of a few bits: sixteen lanes, and in each of them sixteen positions.
//
// A row of a block is sixteen 32-bit words, one a lane, so that a code position is one shift and one mask for
// all lanes. 2 bits: one row, position i in bits 2i. 4 bits: two rows of eight positions. 8 bits: four rows of
// four. 3 bits: the low two bits as for 2 bits, then sixteen 16-bit words with the high bit of position i in
// bit i. Always 32 * bits bytes. A block is zeroed before codes are put.
#pragma once
#include "simd.h"

template <int BITS> struct Codes {
  static constexpr int BYTES = 32 * BITS;
  static constexpr int PLANE = BITS == 3 ? 2 : BITS;      // bits of a code in the 32-bit words
  static constexpr int PER_WORD = 32 / PLANE;
  static constexpr uint32_t TOP = (1u << BITS) - 1;

  // Calls use(i, codes of position i as sixteen integers) for i = 0 to 15; i is a constant once inlined.
  template <class Use> static inline __attribute__((always_inline)) void each(const char* block, const Use& use) {
    VU high = VU{};
    if constexpr (BITS == 3) high = load_u16(block + 64);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      VU w = load_wide<VU>(block + i / PER_WORD * 64);
      VU c = (w >> (i % PER_WORD * PLANE)) & ((1u << PLANE) - 1);
      if constexpr (BITS == 3) c |= ((high >> i) & 1u) << 2;
      use(i, c);
    }
  }
  // The codes of position i.
  static inline VU get(const char* block, int i) {
    VU c = (load_wide<VU>(block + i / PER_WORD * 64) >> (i % PER_WORD * PLANE)) & ((1u << PLANE) - 1);
    if constexpr (BITS == 3) c |= ((load_u16(block + 64) >> i) & 1u) << 2;
    return c;
  }
  static inline void put(char* block, int lane, int i, uint32_t code) {
    ((uint32_t*)block)[i / PER_WORD * LANES + lane] |= (code & ((1u << PLANE) - 1)) << (i % PER_WORD * PLANE);
    if constexpr (BITS == 3) ((uint16_t*)(block + 64))[lane] |= (uint16_t)((code >> 2) << i);
  }
  // Replaces the codes of position i in those lanes where `lanes` is -1 and not 0; needs no zeroed block.
  static inline void put_lanes(char* block, int i, VU codes, VI lanes) {
    const int shift = i % PER_WORD * PLANE;
    char* w = block + i / PER_WORD * 64;
    const VU field = (VU)lanes & (((1u << PLANE) - 1) << shift);
    store_wide(w, (load_wide<VU>(w) & ~field) | ((codes << shift) & field));
    if constexpr (BITS == 3) {
      uint16_t* h = (uint16_t*)(block + 64);
      for (int l = 0; l < LANES; l++)
        if (lanes[l]) h[l] = (uint16_t)((h[l] & ~(1u << i)) | (codes[l] >> 2) << i);
    }
  }

  // The fast way to read: codes where they lie in their words, not shifted down, as floats. Position i comes
  // times 1 / down(i), a power of two, which the number that it is multiplied with makes good exactly.
  static constexpr bool shifted(int i) { return i % PER_WORD == PER_WORD - 1; }  // else the sign bit is in it
  static constexpr float down(int i) { return shifted(i) ? 1.0f : 1.0f / (float)(1u << (i % PER_WORD * PLANE)); }
};

// Codes as floats.
static inline V as_floats(VU codes) { return floats_of(codes); }

// Vectors as wide as the processor's: sixteen lanes are one or two of them. The compiler keeps sixteen-lane
// vectors in registers only where there are such, and the innermost loop cannot do without.
#if defined(__AVX512F__)
typedef V Part;
typedef VU PartU;
typedef VI PartI;
#else
typedef float Part __attribute__((vector_size(32)));
typedef uint32_t PartU __attribute__((vector_size(32)));
typedef int32_t PartI __attribute__((vector_size(32)));
#endif
typedef Part Partunaligned __attribute__((aligned(4), may_alias));
typedef PartU PartUunaligned __attribute__((aligned(2), may_alias));
constexpr int PART = sizeof(Part) / 4, PARTS = LANES / PART;

// acc[r][c] += sum over positions i, in order, of block c's codes at i times w[r][c][i] / down(i).
template <int BITS, int R, int C>
static inline __attribute__((always_inline)) void add_codes(const char* const* blocks, const float* const (&w)[R][C],
                                                            Part (&acc)[R][C][PARTS]) {
  typedef Codes<BITS> K;
  typedef uint16_t Half __attribute__((vector_size(PART * 2), aligned(2), may_alias));
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const int at = i / K::PER_WORD * LANES, s = i % K::PER_WORD * K::PLANE;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; p++) {
        PartU u = *(const PartUunaligned*)(blocks[c] + (at + p * PART) * 4);
        if (K::shifted(i))
          u >>= s;
        else
          u &= ((1u << K::PLANE) - 1) << s;
        if constexpr (BITS == 3) {
          PartU h = __builtin_convertvector(*(const Half*)(blocks[c] + 64 + p * PART * 2), PartU);
          u |= K::shifted(i) ? (h >> (i - 2)) & 4u : (h << (s + 2 - i)) & (4u << s);
        }
        const Part x = __builtin_convertvector((PartI)u, Part);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][c][p] += x * w[r][c][i];
      }
  }
}
