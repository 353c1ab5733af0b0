// Attention over a cache that codes K and V of all heads of a layer together (RotateKV, KVQuant).
//
// Keys and values are decoded tile by tile (16 tokens of all heads) into a thread's own memory: codes, rows
// kept in full in their place, the rows not coded yet behind them, then rotary embedding, for keys are stored
// without. All heads and a tile of rows then use what was decoded. Where things lie: kernels/per_layer.py.
//
// Each superblock of 512 keys gives a row a result of its own (largest score, sum, mix of values), and these
// are joined in ascending order by one function. So it does not matter by a bit whether one thread walks a
// row's superblocks or several threads take one each, nor which rows are computed together.
//
// A codec is a struct made from (PerLayer, layer) with
//   keys(unit, place, tile)     channel c of 16 tokens to tile[place ? place[c] : c][16]
//   values(unit, tile)          to tile [G][16][d]
//   encode(ku, vu, t, k, v)     token t of a unit from rows of `width` floats; its place holds zeros
#pragma once
#include <vector>

#include "attention.h"

struct PerLayer {  // mirrored in kernels/per_layer.py, which says what they mean
  char* arena;
  const int32_t *full, *coded;
  const int32_t *kept_at, *kept_page, *kept_count;
  const int32_t *start, *done, *spans;
  const uint8_t* mask;
  const float *cos, *sin, *new_cos, *new_sin;
  const int32_t* order;
  const void* codec;
  i64 table_seq, k_unit, v_unit;
  int32_t kind, bits, n_layers, layer, n_spans, H, G, d, kept_max, hadamard, folded;
  float scale;
};

// Orthonormal Hadamard transforms of `block` channels after one another, in place: of sixteen tokens at once,
// two stages of butterflies a pass,
static inline void hadamard_tile(float* x, int width, int block) {
  const float norm = 1.0f / sqrtf((float)block);
  for (float* b = x; b < x + (i64)width * LANES; b += block * LANES) {
    auto at = [&](int i) { return loadv(b + i * LANES); };
    auto put = [&](int i, V y, bool last) { storev(b + i * LANES, last ? y * norm : y); };
    auto pass4 = [&](int h, bool last) {
      for (int i = 0; i < block; i += 4 * h)
        for (int j = i; j < i + h; j++) {
          const V p = at(j), q = at(j + h), r = at(j + 2 * h), s = at(j + 3 * h);
          const V a = p + q, c = p - q, e = r + s, f = r - s;
          put(j, a + e, last);
          put(j + h, c + f, last);
          put(j + 2 * h, a - e, last);
          put(j + 3 * h, c - f, last);
        }
    };
    int h = 1;
    for (; 4 * h < block; h *= 4) pass4(h, false);
    if (4 * h == block) {
      pass4(h, true);
    } else {
      for (int j = 0; j < h; j++) {
        const V p = at(j), q = at(j + h);
        put(j, p + q, true);
        put(j + h, p - q, true);
      }
    }
  }
}
// and of one row.
static inline void hadamard_row(float* x, int width, int block) {
  const float norm = 1.0f / sqrtf((float)block);
  for (float* b = x; b < x + width; b += block) {
    for (int h = 1; h < block; h *= 2)
      for (int i = 0; i < block; i += 2 * h)
        for (int j = i; j < i + h; j++) {
          const float p = b[j], q = b[j + h];
          b[j] = p + q;
          b[j + h] = p - q;
        }
    for (int i = 0; i < block; i++) b[i] *= norm;
  }
}

// Where the rows of one sequence lie in layer `layer`.
template <class E> struct LayerRows {
  const PerLayer& p;
  const int seq, layer, width, done, n_kept;
  const int32_t *kept_at, *kept_page, *order;
  LayerRows(const PerLayer& per, int s, int l)
      : p(per), seq(s), layer(l), width(per.G * per.d), done(per.done[s]),
        n_kept(per.kept_count[(i64)s * per.n_layers + l]),
        kept_at(per.kept_at + ((i64)s * per.n_layers + l) * per.kept_max),
        kept_page(per.kept_page + ((i64)s * per.n_layers + l) * per.kept_max),
        order(per.order ? per.order + (i64)l * width : nullptr) {}
  E* full(int page) const {
    return (E*)p.arena + ((i64)p.full[seq * p.table_seq + page] * p.n_layers + layer) * 2 * PAGE * width;
  }
  char* coded(int page) const {
    return p.arena + ((i64)p.coded[seq * p.table_seq + page] * p.n_layers + layer) * (p.k_unit + p.v_unit);
  }
  E* kept(int i) const { return (E*)p.arena + (i64)kept_page[i] * 2 * width; }
  // Calls use(lane, row) for tokens of a page that are kept in full.
  template <class Use> void each_kept(int page, const Use& use) const {
    for (int i = 0; i < n_kept; i++)
      if (kept_at[i] / PAGE == page) use(kept_at[i] % PAGE, kept(i));
  }
  int coded_in(int page) const {  // how many tokens of a page are coded
    int n = done - page * PAGE;
    return n < 0 ? 0 : (n > PAGE ? PAGE : n);
  }

  // Rows in full over a tile of keys: those kept, and the `from`-th and later ones of the page.
  void put_full_keys(int page, int from, const int32_t* place, float* tile) const {
    if (from < PAGE) {
      const E* raw = full(page);
      static const int32_t lane[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const VI mine = load_wide<VI>(lane) >= from;
      for (int c = 0; c < width; c++) {
        float* row = tile + (place ? place[c] : c) * LANES;
        V x = load16(raw + c * PAGE);
        storev(row, from ? select(mine, x, loadv(row)) : x);
      }
    }
    if (from)
      each_kept(page, [&](int t, const E* row) {
        for (int c = 0; c < width; c++) tile[(place ? place[c] : c) * LANES + t] = to_float(row[c]);
      });
  }
  // Keys of a page as attention wants them, [G * d][16], of `total` rows; `row0` is the step's number of the first new one.
  template <class Codec> void keys(const Codec& codec, int page, int total, int row0, float* tile) const {
    const int n = coded_in(page), from = total > page * PAGE + n ? n : PAGE;
    if (n) codec.keys(coded(page), order, tile);
    if (p.folded) put_full_keys(page, from, order, tile);
    if (p.hadamard > 1 && (n || p.folded)) hadamard_tile(tile, width, p.hadamard);
    if (!p.folded) put_full_keys(page, from, nullptr, tile);
    if (!p.cos) return;
    const int half = p.d / 2, base = p.start[seq];
    const float *cs = p.cos + (i64)page * half * LANES, *sn = p.sin + (i64)page * half * LANES;
    float own[2][256 * LANES];
    if (p.new_cos && total > page * PAGE && (page + 1) * PAGE > base) {  // in a tree a row's place is not its position
      memcpy(own[0], cs, (size_t)half * LANES * sizeof(float));
      memcpy(own[1], sn, (size_t)half * LANES * sizeof(float));
      for (int t = base > page * PAGE ? base - page * PAGE : 0; t < PAGE && page * PAGE + t < total; t++)
        for (int i = 0; i < half; i++) {
          const i64 at = (i64)(row0 + page * PAGE + t - base) * half + i;
          own[0][i * LANES + t] = p.new_cos[at];
          own[1][i * LANES + t] = p.new_sin[at];
        }
      cs = own[0];
      sn = own[1];
    }
    for (int g = 0; g < p.G; g++) {
      float *a = tile + (i64)g * p.d * LANES, *b = a + half * LANES;
      for (int i = 0; i < half * LANES; i += LANES) {
        V x = loadv(a + i), y = loadv(b + i), c = loadv(cs + i), s = loadv(sn + i);
        // One product a statement: which of the two is fused with the sum must be that of `Model::rotate`.
        V p = x * c, r = y * c;
        p = p - y * s;
        r = r + x * s;
        storev(a + i, p);
        storev(b + i, r);
      }
    }
  }
  // Values of a page: [G][16][d].
  template <class Codec> void values(const Codec& codec, int page, int total, float* tile) const {
    const int n = coded_in(page), end = total - page * PAGE < PAGE ? total - page * PAGE : PAGE, d = p.d;
    if (n) codec.values(coded(page) + p.k_unit, tile);
    auto put = [&](int t, const E* row, i64 stride) {
      for (int g = 0; g < p.G; g++)
        for (int i = 0; i < d; i += LANES) storev(tile + ((i64)g * PAGE + t) * d + i, load16(row + g * stride + i));
    };
    if (n < end) {
      const E* raw = full(page) + PAGE * width;
      for (int t = n; t < end; t++) put(t, raw + t * d, PAGE * d);
    }
    if (n) each_kept(page, [&](int t, const E* row) { put(t, row + width, d); });
  }
};

// What attention sees of a layer: decoded tiles. One compiled attention serves every codec and row type.
struct Tiles {
  virtual void keys(int seq, int page, int total, int row0, float* tile) const = 0;
  virtual void values(int seq, int page, int total, float* tile) const = 0;
};
template <class E, class Codec> struct CodedTiles final : Tiles {
  const PerLayer& p;
  const Codec& codec;
  CodedTiles(const PerLayer& per, const Codec& c) : p(per), codec(c) {}
  void keys(int seq, int page, int total, int row0, float* tile) const override {
    LayerRows<E>(p, seq, p.layer).keys(codec, page, total, row0, tile);
  }
  void values(int seq, int page, int total, float* tile) const override {
    LayerRows<E>(p, seq, p.layer).values(codec, page, total, tile);
  }
};

// Stores the new rows k, v [N, G, d] of every span in full.
template <class E> static void write_per_layer(const PerLayer& p, const float* k, const float* v) {
  const int width = p.G * p.d;
  for (int s = 0; s < p.n_spans; s++) {
    const int32_t* span = p.spans + s * 3;
    LayerRows<E> rows(p, span[0], p.layer);
    for (int r = span[1]; r < span[2]; r++) {
      const int at = p.start[span[0]] + r - span[1], t = at % PAGE;
      E *kp = rows.full(at / PAGE), *vp = kp + PAGE * width;
      for (int c = 0; c < width; c++) {
        from_float(k[(i64)r * width + c], kp + c * PAGE + t);
        from_float(v[(i64)r * width + c], vp + (c / p.d * PAGE + t) * p.d + c % p.d);
      }
    }
  }
}

// Codes tokens [from, to) of one page of one layer; tokens kept in full are copied to their own rows instead.
template <class E, class Codec>
static void code_page(const PerLayer& p, const Codec& codec, int seq, int layer, int page, int from, int to, Floats& w) {
  LayerRows<E> rows(p, seq, layer);
  const int width = rows.width;
  w.resize(3 * width);
  float *k = w.data(), *turned = k + width, *v = turned + width;
  const E* raw = rows.full(page);
  char* unit = rows.coded(page);
  if (from == 0) memset(unit, 0, p.k_unit + p.v_unit);
  for (int t = from; t < to; t++) {
    E* keep = nullptr;
    rows.each_kept(page, [&](int lane, E* row) { if (lane == t) keep = row; });
    for (int c = 0; c < width; c++) {
      const E &x = raw[c * PAGE + t], &y = raw[PAGE * width + (c / p.d * PAGE + t) * p.d + c % p.d];
      if (keep) keep[c] = x, keep[width + c] = y;
      k[c] = to_float(x);
      v[c] = to_float(y);
    }
    if (keep) continue;
    if (p.folded) {
      codec.encode(unit, unit + p.k_unit, t, k, v);
      continue;
    }
    if (p.hadamard > 1) hadamard_row(k, width, p.hadamard);
    for (int c = 0; c < width; c++) turned[c] = k[rows.order ? rows.order[c] : c];
    codec.encode(unit, unit + p.k_unit, t, turned, v);
  }
}

// Joins a row's result over more keys into the one so far: state = {largest score, sum, mix [d]}.
static inline void join_states(float* a, const float* b, int d) {
  if (b[0] == -INFINITY) return;
  const float top = a[0] > b[0] ? a[0] : b[0], wa = expf(a[0] - top), wb = expf(b[0] - top);
  a[0] = top;
  a[1] = a[1] * wa + b[1] * wb;
  for (int i = 2; i < d + 2; i++) a[i] = a[i] * wa + b[i] * wb;
}
static inline void empty_state(float* a, int d) {
  a[0] = -INFINITY;
  memset(a + 1, 0, (d + 1) * sizeof(float));
}

// Rows [first, first + count) of a span over superblocks [sb0, sb1), to states at `at` of the step's buffer.
struct PerLayerItem { int span, first, count, sb0, sb1; i64 at; };
constexpr int TILE_PAGES = 4;  // tiles of keys in flight, so that few rows still fill the processor

// As ROW_CASES, for float tiles and fewer numbers of rows: decoding a tile costs more than a repeated row.
#define TILE_CASES(F, R, ...)                                                            \
  switch (R) {                                                                           \
    case 1: F<float, 1>(__VA_ARGS__); break;   case 2: F<float, 2>(__VA_ARGS__); break;  \
    case 4: F<float, 4>(__VA_ARGS__); break;   case 8: F<float, 8>(__VA_ARGS__); break;  \
    default: F<float, 16>(__VA_ARGS__); break;                                           \
  }

struct PerLayerScratch {
  Floats tile, s, q, fresh, row, spare;
  void size(int width, int pairs, int d) {
    auto grow = [](Floats& b, size_t n) { if (b.size() < n) b.resize(n); };
    grow(tile, (size_t)TILE_PAGES * width * PAGE);
    grow(s, (size_t)pairs * SUPER);
    grow(q, (size_t)pairs * d);
    grow(fresh, (size_t)pairs * (d + 2));
    grow(spare, (size_t)MAX_ROWS * d);
  }
};

static void per_layer_item(const PerLayer& p, const Tiles& tiles, PerLayerScratch& w, const float* q, i64 mask_at,
                           const PerLayerItem& item, float* states) {
  const int32_t* s = p.spans + item.span * 3;
  const int d = p.d, group = p.H / p.G, per_head = item.count * group, pairs = item.count * p.H;
  const int width = p.G * d, n_new = s[2] - s[1], base = p.start[s[0]], last = base + item.first + item.count;
  w.size(width, pairs, d);
  // Pair g * per_head + j is row j / group with head g * group + j % group.
  for (int i = 0; i < pairs; i++) {
    const int g = i / per_head, j = i % per_head;
    const float* src = q + ((i64)(s[1] + item.first + j / group) * p.H + g * group + j % group) * d;
    for (int c = 0; c < d; c++) w.q[(i64)i * d + c] = src[c] * p.scale;
    empty_state(states + (i64)i * (d + 2), d);
  }
  // Calls use(head, pairs there are, lanes of the row template, those pairs) for each head's pairs in turn.
  auto each_rows = [&](const auto& use) {
    for (int g = 0; g < p.G; g++)
      for (int j = 0; j < per_head; j += MAX_ROWS) {
        const int R = per_head - j < MAX_ROWS ? per_head - j : MAX_ROWS, RT = R <= 2 ? R : (R <= 4 ? 4 : (R <= 8 ? 8 : 16));
        int pair[MAX_ROWS];
        for (int r = 0; r < RT; r++) pair[r] = g * per_head + j + (r < R ? r : R - 1);  // the last one again
        use(g, R, RT, pair);
      }
  };
  for (int sb = item.sb0 * SUPER; sb < item.sb1 * SUPER && sb < last; sb += SUPER) {
    const int count = last - sb < SUPER ? last - sb : SUPER, n_pages = (count + PAGE - 1) / PAGE;
    for (int at = 0; at < n_pages; at += TILE_PAGES) {
      const int n = n_pages - at < TILE_PAGES ? n_pages - at : TILE_PAGES;
      for (int i = 0; i < n; i++) 
        tiles.keys(s[0], sb / PAGE + at + i, base + n_new, s[1], w.tile.data() + (i64)i * width * PAGE);
      each_rows([&](int g, int, int RT, const int* pair) {
        const float *qp[MAX_ROWS], *pages[TILE_PAGES];
        float* sp[MAX_ROWS];
        for (int r = 0; r < RT; r++) {
          qp[r] = w.q.data() + (i64)pair[r] * d;
          sp[r] = w.s.data() + (i64)pair[r] * SUPER + at * PAGE;
        }
        for (int i = 0; i < n; i++) pages[i] = w.tile.data() + ((i64)i * width + g * d) * PAGE;
        TILE_CASES(scores_of, RT, qp, pages, n, d, sp)
      });
    }
    for (int i = 0; i < pairs; i++) {
      const int row = item.first + i % per_head / group;
      float* x = w.s.data() + (i64)i * SUPER;
      for (int j = base + row + 1 > sb ? base + row + 1 - sb : 0; j < n_pages * PAGE; j++) x[j] = -INFINITY;
      if (p.mask)
        for (int j = base > sb ? base - sb : 0; j < count; j++)
          if (sb + j <= base + row && !p.mask[mask_at + (i64)row * n_new + (sb + j - base)]) x[j] = -INFINITY;
      float* state = w.fresh.data() + (i64)i * (d + 2);
      empty_state(state, d);
      Row fresh;
      fresh.out = state + 2;
      take_scores(fresh, x, n_pages * PAGE, d);
      state[0] = fresh.m;
      state[1] = fresh.l;
    }
    for (int at = 0; at < n_pages; at++) {
      tiles.values(s[0], sb / PAGE + at, base + n_new, w.tile.data());
      each_rows([&](int g, int R, int RT, const int* pair) {
        const float *pp[MAX_ROWS], *tile = w.tile.data() + (i64)g * PAGE * d;
        float* op[MAX_ROWS];
        for (int r = 0; r < RT; r++) {
          pp[r] = w.s.data() + (i64)pair[r] * SUPER + at * PAGE;
          // A pair that is there again must not be added to twice.
          op[r] = r < R ? w.fresh.data() + (i64)pair[r] * (d + 2) + 2 : w.spare.data() + (i64)r * d;
        }
        TILE_CASES(values_of, RT, pp, &tile, 0, count - at * PAGE < PAGE ? count - at * PAGE : PAGE, d, op)
      });
    }
    for (int i = 0; i < pairs; i++) join_states(states + (i64)i * (d + 2), w.fresh.data() + (i64)i * (d + 2), d);
  }
}

// Attention of the new rows: q [N, H, d] rotated, out [N, H, d].
static void attend_per_layer(Team& team, const PerLayer& p, const Tiles& tiles, const float* q, float* out) {
  const int d = p.d, group = p.H / p.G, tile_rows = p.H < 128 ? 128 / p.H : 1;
  std::vector<PerLayerItem> items;
  std::vector<i64> mask_at(p.n_spans + 1, 0);
  int row_tiles = 0;
  for (int s = 0; s < p.n_spans; s++) {
    const i64 n = p.spans[s * 3 + 2] - p.spans[s * 3 + 1];
    mask_at[s + 1] = mask_at[s] + n * n;
    row_tiles += (int)((n + tile_rows - 1) / tile_rows);
  }
  i64 at = 0;
  for (int s = 0; s < p.n_spans; s++) {
    const int n = p.spans[s * 3 + 2] - p.spans[s * 3 + 1];
    for (int i = 0; i < n; i += tile_rows) {
      const int count = n - i < tile_rows ? n - i : tile_rows;
      const int blocks = (p.start[p.spans[s * 3]] + i + count + SUPER - 1) / SUPER;
      const int each = row_tiles < 2 * team.size ? 1 : blocks;  // few rows: threads share a row's superblocks
      for (int b = 0; b < blocks; b += each) {
        items.push_back({s, i, count, b, b + each, at});
        at += (i64)count * p.H * (d + 2);
      }
    }
  }
  static thread_local Floats buffer;
  if (buffer.size() < (size_t)at) buffer.resize(at);
  float* states = buffer.data();
  team.next = 0;
  team.run([&](int) {
    static thread_local PerLayerScratch w;
    for (i64 i = team.take(); i < (i64)items.size(); i = team.take())
      per_layer_item(p, tiles, w, q, mask_at[items[i].span], items[i], states + items[i].at);
  });
  for (size_t i = 0; i < items.size();) {
    const PerLayerItem& item = items[i];
    const int per_head = item.count * group, row0 = p.spans[item.span * 3 + 1] + item.first;
    float* sum = states + item.at;
    for (i++; i < items.size() && items[i].span == item.span && items[i].first == item.first; i++)
      for (int j = 0; j < item.count * p.H; j++)
        join_states(sum + (i64)j * (d + 2), states + items[i].at + (i64)j * (d + 2), d);
    for (int j = 0; j < item.count * p.H; j++) {
      const float *state = sum + (i64)j * (d + 2), inv = state[1] > 0 ? 1.0f / state[1] : 0.0f;
      float* to = out + ((i64)(row0 + j % per_head / group) * p.H + j / per_head * group + j % per_head % group) * d;
      for (int c = 0; c < d; c++) to[c] = state[2 + c] * inv;
    }
  }
}
