// The C functions that kernels/native_per_layer.py calls; included by trimtab.cpp.
#pragma once
#include <type_traits>

#include "affine.h"
#include "nuq.h"
#include "per_layer.h"

struct NoCodec {  // nothing is ever coded
  NoCodec(const PerLayer&, int) {}
  void keys(const char*, const int32_t*, float*) const {}
  void values(const char*, float*) const {}
  void encode(char*, char*, int, const float*, const float*) const {}
};

// Calls use(codec of `layer`) for the codec that the tables name.
template <class Use> static void with_codec(const PerLayer& p, int layer, const Use& use) {
  switch (p.kind * 16 + p.bits) {
    case 16 + 2: return use(Affine16<2>(p, layer));
    case 16 + 3: return use(Affine16<3>(p, layer));
    case 16 + 4: return use(Affine16<4>(p, layer));
    case 32 + 2: return use(Nuq<2, E>(p, layer));
    case 32 + 3: return use(Nuq<3, E>(p, layer));
    case 32 + 4: return use(Nuq<4, E>(p, layer));
    default: return use(NoCodec(p, layer));
  }
}

API void tt_per_layer_write(const PerLayer* p, const float* k, const float* v) { write_per_layer<E>(*p, k, v); }
API void tt_per_layer_attend(void* team, const PerLayer* p, const float* q, float* out) {
  with_codec(*p, p->layer, [&](const auto& codec) {
    attend_per_layer(*(Team*)team, *p, CodedTiles<E, std::decay_t<decltype(codec)>>(*p, codec), q, out);
  });
}
// Codes rows [from, to) of one sequence in all layers. Pages are independent; inside one tokens go in order.
API void tt_per_layer_code(void* team, const PerLayer* p, int seq, int from, int to) {
  Team& tm = *(Team*)team;
  const int first = from / PAGE, pages = (to + PAGE - 1) / PAGE - first;
  auto work = [&](int) {
    static thread_local Floats w;
    for (i64 i = tm.take(); i < (i64)pages * p->n_layers; i = tm.take()) {
      const int layer = (int)(i / pages), page = first + (int)(i % pages), a = from - page * PAGE, b = to - page * PAGE;
      with_codec(*p, layer, [&](const auto& codec) {
        code_page<E>(*p, codec, seq, layer, page, a < 0 ? 0 : a, b > PAGE ? PAGE : b, w);
      });
    }
  };
  tm.next = 0;
  if (to - from == 1) work(0);  // waking the others costs more than a token's codes
  else tm.run(work);
}
// Orthonormal Hadamard transforms of `block` consecutive numbers, in place.
API void tt_hadamard(float* x, i64 rows, int width, int block) {
  for (i64 i = 0; i < rows; i++) hadamard_row(x + i * width, width, block);
}
