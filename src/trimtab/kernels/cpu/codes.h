// A block of 16 x 16 codes of a few bits: sixteen lanes, and in each of them sixteen positions.
//
// A row of a block is sixteen 32-bit words, one a lane, so that a code position is one shift and one mask for
// all lanes. 2 bits: one row, position i in bits 2i. 4 bits: two rows of eight positions. 8 bits: four rows of
// four. 3 bits: the low two bits as for 2 bits, then sixteen 16-bit words with the high bit of position i in
// bit i. Always 32 * bits bytes. A block is zeroed before codes are put.
#pragma once
#include "simd.h"

typedef uint16_t VS __attribute__((vector_size(32)));
typedef uint16_t VSunaligned __attribute__((vector_size(32), aligned(2), may_alias));

template <int BITS> struct Codes {
  static constexpr int BYTES = 32 * BITS;
  static constexpr int PLANE = BITS == 3 ? 2 : BITS;      // bits of a code in the 32-bit words
  static constexpr int PER_WORD = 32 / PLANE;
  static constexpr uint32_t TOP = (1u << BITS) - 1;

  // Calls use(i, codes of position i as sixteen integers) for i = 0 to 15; i is a constant once inlined.
  template <class Use> static inline __attribute__((always_inline)) void each(const char* block, const Use& use) {
    VU high = VU{};
    if constexpr (BITS == 3) high = __builtin_convertvector(*(const VSunaligned*)(block + 64), VU);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      VU w = *(const VUunaligned*)(block + i / PER_WORD * 64);
      VU c = (w >> (i % PER_WORD * PLANE)) & ((1u << PLANE) - 1);
      if constexpr (BITS == 3) c |= ((high >> i) & 1u) << 2;
      use(i, c);
    }
  }
  static inline void put(char* block, int lane, int i, uint32_t code) {
    ((uint32_t*)block)[i / PER_WORD * LANES + lane] |= (code & ((1u << PLANE) - 1)) << (i % PER_WORD * PLANE);
    if constexpr (BITS == 3) ((uint16_t*)(block + 64))[lane] |= (uint16_t)((code >> 2) << i);
  }
};

// Codes as floats.
static inline V as_floats(VU codes) { return __builtin_convertvector((VI)codes, V); }
