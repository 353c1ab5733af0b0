// The codec of RotateKV: min-max codes with a scale and a zero for each token and `group` channels, K and V.
//
// A unit is 16 tokens of `width` channels: blocks of codes, then f16 scales and zeros. K: lanes are tokens,
// block b has channels 16 b to 16 b + 15, constants are [width / group][16]. V: lanes are channels, constants
// are [16][width / group]. x = code * scale + zero.
#pragma once
#include "codes.h"
#include "per_layer.h"

struct AffineSettings {  // mirrored in kernels/affine.py
  int32_t group;
  float clip;
};

template <int BITS> struct Affine16 {
  const int width, d, group, groups;
  const float clip;
  static constexpr int BYTES = Codes<BITS>::BYTES;
  Affine16(const PerLayer& p, int)
      : width(p.G * p.d), d(p.d), group(((const AffineSettings*)p.codec)->group), groups(width / group),
        clip(((const AffineSettings*)p.codec)->clip) {}
  f16* constants(char* unit) const { return (f16*)(unit + width / LANES * BYTES); }
  const f16* constants(const char* unit) const { return (const f16*)(unit + width / LANES * BYTES); }

  void keys(const char* unit, const int32_t* place, float* tile) const {
    const f16* k = constants(unit);
    for (int b = 0; b < width / LANES; b++) {
      const int g = b * LANES / group;
      const V scale = load16(k + g * PAGE), zero = load16(k + (groups + g) * PAGE);
      Codes<BITS>::each(unit + b * BYTES, [&](int i, VU c) {
        const int at = b * LANES + i;
        storev(tile + (place ? place[at] : at) * LANES, as_floats(c) * scale + zero);
      });
    }
  }
  void values(const char* unit, float* tile) const {
    const f16* k = constants(unit);
    for (int b = 0; b < width / LANES; b++) {
      const int at = b * LANES, g = at / group;
      float* to = tile + (i64)at / d * PAGE * d + at % d;
      Codes<BITS>::each(unit + b * BYTES, [&](int t, VU c) {
        storev(to + t * d, as_floats(c) * to_float(k[t * groups + g]) + to_float(k[(PAGE + t) * groups + g]));
      });
    }
  }
  void encode(char* ku, char* vu, int t, const float* k, const float* v) const {
    for (int g = 0; g < groups; g++) {
      f16 *kc = constants(ku) + g * PAGE + t, *vc = constants(vu) + t * groups + g;
      code_group(k + g * group, kc, kc + groups * PAGE, [&](int i, uint32_t c) {
        const int at = g * group + i;
        Codes<BITS>::put(ku + at / LANES * BYTES, t, at % LANES, c);
      });
      code_group(v + g * group, vc, vc + groups * PAGE, [&](int i, uint32_t c) {
        const int at = g * group + i;
        Codes<BITS>::put(vu + at / LANES * BYTES, at % LANES, t, c);
      });
    }
  }
  // The zero point -lo / scale is a whole number, so that 0 is one of the values; kept as -point * scale.
  template <class Put> void code_group(const float* x, f16* scale, f16* zero, const Put& put) const {
    float lo = x[0], hi = x[0];
    for (int i = 1; i < group; i++) {
      lo = x[i] < lo ? x[i] : lo;
      hi = x[i] > hi ? x[i] : hi;
    }
    lo *= clip;
    hi *= clip;
    const float top = (float)Codes<BITS>::TOP;
    from_float((hi - lo) / top, scale);
    const float s = to_float(*scale);
    from_float(s > 0 ? nearbyintf(lo / s) * s : lo, zero);
    const float z = to_float(*zero);
    if (!(s > 0)) return;
    for (int i = 0; i < group; i++) {
      const float c = nearbyintf((x[i] - z) / s);
      put(i, (uint32_t)(c < 0 ? 0 : (c > top ? top : c)));
    }
  }
};
