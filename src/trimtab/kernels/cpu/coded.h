// Attention over keys and values of which the older part is coded in a few bits (KIVI, round-to-nearest).
//
// Each (sequence, layer, head) has its own length and four tables of pages, out of one arena or, where V lies
// in another memory than K, of two:
//   K and V in full    16 rows of one head in the model's type: K [d, 16], V [16, d]
//   K coded            `k_unit` tokens of one head; V coded: 16 tokens of one head
// A coded unit is blocks of 16 x 16 codes (codes.h), then its constants in f16: all scales, then all zeros;
// a code means code * scale + zero. In K the lanes of a block are tokens and its positions channels, blocks
// [k_unit / 16][d / 16]; in V the lanes are channels and the positions tokens, blocks [d / 16].
//   K by channel  (KIVI) a group is `group` tokens of one channel, constants [k_unit / group][d]
//   K by token, V        a group is `group` channels of one token, constants [d / group][16]
// Keys below k_done and values below v_done are coded. Where a group is whole blocks, pages that are coded
// throughout are never unpacked: the constants are folded into q and into the weights. Other pages are
// assembled as floats, 16 rows at a time.
#pragma once
#include "attention.h"
#include "codes.h"

struct Coded : Paged {  // mirrored in kernels/coded.py; `table` names the pages of K in full
  const int32_t *v_full, *k_coded, *v_coded;  // tables like `table`
  const int32_t *k_done, *v_done;             // counts like `start`
  void* v_arena;                              // the pages of V; those of K are in `arena`
  i64 k_bytes, v_bytes;                       // of a coded unit
  int32_t bits, group, k_unit, by_token;
};

static inline void next_layer(Coded& c) {
  for (const int32_t** table : {&c.v_full, &c.k_coded, &c.v_coded}) *table += c.table_layer;
  for (const int32_t** count : {&c.k_done, &c.v_done}) *count += c.start_layer;
  next_layer((Paged&)c);
}

// One head's rows.
template <class E> struct CodedHead {
  const Coded& c;
  i64 table, count;
  CodedHead(const Coded& rows, int seq, int g)
      : c(rows), table(seq * rows.table_seq + g * rows.table_head), count(seq * rows.start_seq + g * rows.start_head) {}

  E* k_page(int j) const { return (E*)c.arena + (i64)c.table[table + j] * PAGE * c.d; }
  E* v_page(int j) const { return (E*)c.v_arena + (i64)c.v_full[table + j] * PAGE * c.d; }
  char* k_unit(int u) const { return (char*)c.arena + c.k_coded[table + u] * c.k_bytes; }
  char* v_unit(int u) const { return (char*)c.v_arena + c.v_coded[table + u] * c.v_bytes; }
  i64 block() const { return 32 * c.bits; }
  // Blocks of page j of K; constants and zeros of a unit.
  char* k_blocks(int j) const { return k_unit(j * PAGE / c.k_unit) + j * PAGE % c.k_unit / PAGE * (c.d / LANES) * block(); }
  f16* k_scales(int u) const { return (f16*)(k_unit(u) + (i64)c.k_unit / PAGE * (c.d / LANES) * block()); }
  int k_groups() const { return c.by_token ? c.d / c.group * PAGE : c.k_unit / c.group * c.d; }  // scales of a unit
  f16* v_scales(int u) const { return (f16*)(v_unit(u) + (c.d / LANES) * block()); }
  int v_groups() const { return c.d / c.group * PAGE; }
  bool whole_blocks() const { return c.group % LANES == 0; }
};

#define BIT_CASES(F, ...)                    \
  switch (c.bits) {                          \
    case 2: F<2>(__VA_ARGS__); break;        \
    case 3: F<3>(__VA_ARGS__); break;        \
    case 4: F<4>(__VA_ARGS__); break;        \
    default: F<8>(__VA_ARGS__); break;       \
  }

// --- coding

static inline V smaller(V a, V b) { return select(b < a, b, a); }
static inline float min_lanes(V x) { return -max_lanes(-x); }
static inline V round16(V x, f16* out, VI lanes) {  // to f16, stored where `lanes` says so
  float rounded[LANES];
  for (int i = 0; i < LANES; i++) {
    f16 h;
    from_float(x[i], &h);
    if (lanes[i]) out[i] = h;
    rounded[i] = to_float(h);
  }
  return loadv(rounded);
}
template <int BITS> static inline VU codes_of(V x, V scale, V zero) {
  V y = (x - zero) / scale;
  const V top = splat((float)Codes<BITS>::TOP), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to an integer
  y = select(y > top, top, select(y > 0.0f, y, V{}));
  return (VU)select(scale > 0.0f, (VI)(y + magic), VI{}) & Codes<BITS>::TOP;
}
// Lanes of block b that belong to numbers [at, at + n).
static inline VI lanes_of(int b, int at, int n) {
  static const int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const VI lane = load_wide<VI>(numbers);
  return (lane >= at - b * LANES) & (lane < at + n - b * LANES);
}
// Codes one group, numbers [at, at + n) which lie along the lanes of successive blocks at position i:
// load(b) gives block b's sixteen.
template <int BITS, class Load>
static inline void code_lanes(int at, int n, const Load& load, char* blocks, i64 stride, int i, f16* scale, f16* zero) {
  V lo = splat(INFINITY), hi = -lo;
  const int b0 = at / LANES, b1 = (at + n + LANES - 1) / LANES;
  for (int b = b0; b < b1; b++) {
    const V x = load(b);
    const VI mine = lanes_of(b, at, n);
    lo = select(mine, smaller(lo, x), lo);
    hi = select(mine, larger(x, hi), hi);
  }
  const float low = min_lanes(lo), high = max_lanes(hi);
  from_float((high - low) / (float)Codes<BITS>::TOP, scale);
  from_float(low, zero);
  const V s = splat(to_float(*scale)), z = splat(to_float(*zero));
  for (int b = b0; b < b1; b++)
    Codes<BITS>::put_lanes(blocks + b * stride, i, codes_of<BITS>(load(b), s, z), lanes_of(b, at, n));
}

// Codes keys [from, to) of one head; by channel both are multiples of the group.
template <int BITS, class E> static void code_keys(const CodedHead<E>& h, int from, int to) {
  const Coded& c = h.c;
  const int d = c.d, n = c.group;
  const i64 bytes = h.block();
  if (!c.by_token) {
    for (int t = from; t < to; t += n) {
      const int u = t / c.k_unit, at = t % c.k_unit, first = u * c.k_unit / PAGE;
      f16* scales = h.k_scales(u) + at / n * d;
      const E* pages[SUPER];
      for (int b = at / PAGE; b * PAGE < at + n; b++) pages[b] = h.k_page(first + b);
      for (int ch = 0; ch < d; ch++)
        code_lanes<BITS>(at, n, [&](int b) { return load16(pages[b] + ch * PAGE); }, h.k_unit(u) + ch / LANES * bytes,
                         d / LANES * bytes, ch % LANES, scales + ch, scales + h.k_groups() + ch);
    }
    return;
  }
  for (int j = from / PAGE; j * PAGE < to; j++) {
    const E* page = h.k_page(j);
    const VI mine = lanes_of(j, from, to - from);
    for (int g = 0; g < d / n; g++) {
      V lo = load16(page + g * n * PAGE), hi = lo;
      for (int ch = g * n + 1; ch < (g + 1) * n; ch++) {
        const V x = load16(page + ch * PAGE);
        lo = smaller(lo, x);
        hi = larger(hi, x);
      }
      f16* scales = h.k_scales(j) + g * PAGE;
      const V s = round16((hi - lo) / (float)Codes<BITS>::TOP, scales, mine);
      const V z = round16(lo, scales + h.k_groups(), mine);
      for (int ch = g * n; ch < (g + 1) * n; ch++)
        Codes<BITS>::put_lanes(h.k_blocks(j) + ch / LANES * bytes, ch % LANES, codes_of<BITS>(load16(page + ch * PAGE), s, z),
                               mine);
    }
  }
}
template <int BITS, class E> static void code_values(const CodedHead<E>& h, int from, int to) {
  const int d = h.c.d, n = h.c.group;
  for (int t = from; t < to; t++) {
    const E* row = h.v_page(t / PAGE) + t % PAGE * d;
    f16* scales = h.v_scales(t / PAGE) + t % PAGE;
    for (int g = 0; g < d / n; g++)
      code_lanes<BITS>(g * n, n, [&](int b) { return load16(row + b * LANES); }, h.v_unit(t / PAGE), h.block(), t % PAGE,
                       scales + g * PAGE, scales + h.v_groups() + g * PAGE);
  }
}
template <class E> NOINLINE static void code_rows(const Coded& c, int seq, int g, int k_to, int v_to) {
  const CodedHead<E> h(c, seq, g);
  BIT_CASES(code_keys, h, c.k_done[h.count], k_to)
  BIT_CASES(code_values, h, c.v_done[h.count], v_to)
}

// --- storing

// Stores rows [r0, r1) of k and v (float [N, G, d]) of one span in full, behind the rows held.
template <class E> static void write_rows(const Coded& c, const float* k, const float* v, int span, int r0, int r1) {
  const int32_t* s = c.spans + span * 3;
  for (int g = 0; g < c.G; g++) {
    const CodedHead<E> h(c, s[0], g);
    for (int r = r0; r < r1; r++) {
      const int at = held(c, s[0], g) + r - s[1];
      E *kp = h.k_page(at / PAGE) + at % PAGE, *vp = h.v_page(at / PAGE) + at % PAGE * c.d;
      const float *kr = k + ((i64)r * c.G + g) * c.d, *vr = v + ((i64)r * c.G + g) * c.d;
      for (int i = 0; i < c.d; i++) from_float(kr[i], kp + i * PAGE);
      for (int i = 0; i < c.d; i++) from_float(vr[i], vp + i);
    }
  }
}

// --- reading

constexpr int MOST_D = 512;
// Query rows and columns of blocks taken together: enough sums at once to hide the latency of one, and no
// more than there are registers. A row or a column too few repeats the last one.
constexpr int CODE_ROWS = 4;
static constexpr int columns(int R) { return PARTS == 2 && R > 2 ? 1 : 2; }

#define CODE_CASES(F, R, ...) \
  if (R > 2)                  \
    F<BITS, 4>(__VA_ARGS__);  \
  else                        \
    F<BITS, 2>(__VA_ARGS__);

static inline V join(const Part* p) {
#if defined(__AVX__) && !defined(__AVX512F__)
  return V(p[0], p[1]);
#else
  return load_wide<V>(p);
#endif
}
// What add_codes leaves to the numbers that codes at the sixteen positions are multiplied with.
template <int BITS> static inline V fold_down() {
  float f[LANES];
  for (int i = 0; i < LANES; i++) f[i] = Codes<BITS>::down(i);
  return loadv(f);
}
// Folds constants into one row: out = x * scales * fold, and the sum of x * zeros is returned. Apart and by
// itself, so that a row's numbers do not depend on how many others are taken with it.
NOINLINE static float fold_row(const float* x, const f16* scales, const f16* zeros, int n, V fold, float* out) {
  V z = V{};
  for (int i = 0; i < n; i++, x += LANES, out += LANES, scales += LANES, zeros += LANES) {
    storev(out, loadv(x) * (load16(scales) * fold));
    z += loadv(x) * load16(zeros);
  }
  return sum_lanes(z);
}
// The same for the weights of n pages, each with constants of its own.
NOINLINE static float fold_pages(const float* x, const f16* const* scales, int zeros, int n, V fold, float* out) {
  V z = V{};
  for (int j = 0; j < n; j++, x += LANES, out += LANES) {
    storev(out, loadv(x) * (load16(scales[j]) * fold));
    z += loadv(x) * load16(scales[j] + zeros);
  }
  return sum_lanes(z);
}
NOINLINE static float sum_of(const float* x, int n) {
  V sum = V{};
  for (int i = 0; i < n; i += LANES) sum += loadv(x + i);
  return sum_lanes(sum);
}

// Scores and values of one page assembled as floats, two rows at a time.
static inline void tile_scores(const float* const* q, int R, const float* tile, int d, float* const* s, int at) {
  for (int r = 0; r < R; r += 2) {
    const int other = r + 1 < R ? r + 1 : r;
    const float* from[2] = {q[r], q[other]};
    float* to[2] = {s[r] + at, s[other] + at};
    scores_of<float, 2>(from, &tile, 1, d, to);
  }
}
static inline void tile_values(const float* const* w, int R, const float* tile, int at, int n, int d, float* const* out) {
  for (int r = 0; r < R; r += 2) {
    const int other = r + 1 < R ? r + 1 : r;
    const float* from[2] = {w[r] + at, w[other] + at};
    float* to[2] = {out[r], out[other]};
    values_of<float, 2>(from, &tile, 0, n, d, to);
  }
}

template <class E> struct CodedSource {
  const Coded& c;
  CodedHead<E> h;
  int k_done, v_done;
  CodedSource(const Coded& rows, int seq, int g)
      : c(rows), h(rows, seq, g), k_done(rows.k_done[h.count]), v_done(rows.v_done[h.count]) {}
  static int inside(int x, int most) { return x < 0 ? 0 : (x > most ? most : x); }

  NOINLINE void scores(const float* const* q, int R, int sb, int n_pages, float* const* s) const {
    const int fused = h.whole_blocks() ? inside((k_done - sb) / PAGE, n_pages) : 0;
    for (int r = 0; r < R && fused; r += CODE_ROWS)
      BIT_CASES(fused_scores, q + r, R - r, sb / PAGE, fused, s + r)
    int done = fused;
    for (; done < n_pages && sb + done * PAGE < k_done; done++) {
      float tile[PAGE * MOST_D];
      BIT_CASES(k_tile, sb / PAGE + done, tile)
      tile_scores(q, R, tile, c.d, s, done * PAGE);
    }
    const E* pages[SUPER / PAGE];
    for (int i = done; i < n_pages; i++) pages[i - done] = h.k_page(sb / PAGE + i);
    float* rest[MAX_ROWS];
    for (int r = 0; r < R; r++) rest[r] = s[r] + done * PAGE;
    if (done < n_pages) ROW_CASES(scores_of, R, q, pages, n_pages - done, c.d, rest)
  }
  NOINLINE void values(const float* const* w, int R, int sb, int count, float* const* out) const {
    const int fused = h.whole_blocks() ? inside((v_done - sb) / PAGE, count / PAGE) : 0;
    for (int r = 0; r < R && fused; r += CODE_ROWS)
      BIT_CASES(fused_values, w + r, R - r, sb / PAGE, fused, out + r)
    int done = fused;
    for (; done * PAGE < count && sb + done * PAGE < v_done; done++) {
      float tile[PAGE * MOST_D];
      BIT_CASES(v_tile, sb / PAGE + done, tile)
      const int left = count - done * PAGE;
      tile_values(w, R, tile, done * PAGE, left < PAGE ? left : PAGE, c.d, out);
    }
    if (done * PAGE >= count) return;
    const E* pages[SUPER / PAGE];
    for (int i = done; i * PAGE < count; i++) pages[i] = h.v_page(sb / PAGE + i);
    ROW_CASES(values_of, R, w, pages, done * PAGE, count, c.d, out)
  }
  // Rows of values fetched: still coded, in pages like those they come from.
  struct Stage {
    Coded rows;
    std::vector<char, LineAllocator<char>> memory;
    int32_t pages[SUPER / PAGE], units[SUPER / PAGE], coded;
  };
  // Copies the values of rows[0, n), ascending ones of one superblock, out of their memory.
  void stage(const int* rows, int n, Stage& to) const {
    const i64 first = (SUPER * c.d * (i64)sizeof(E) + c.v_bytes - 1) / c.v_bytes;  // units lie behind full pages
    to.memory.resize((first + SUPER / PAGE) * c.v_bytes);
    for (int i = 0; i < SUPER / PAGE; i++) {
      to.pages[i] = i;
      to.units[i] = (int32_t)first + i;
    }
    for (to.coded = 0; to.coded < n && rows[to.coded] < v_done;) to.coded++;
    to.rows = c;
    to.rows.v_arena = to.memory.data();
    to.rows.v_full = to.pages;
    to.rows.v_coded = to.units;
    to.rows.v_done = &to.coded;
    const CodedHead<E> there(to.rows, 0, 0);
    for (int u = 0; u < to.coded; u++) BIT_CASES(copy_codes, rows[u], there, u)
    for (int u = to.coded; u < n; u++)
      memcpy(there.v_page(u / PAGE) + u % PAGE * c.d, h.v_page(rows[u] / PAGE) + rows[u] % PAGE * c.d, c.d * sizeof(E));
  }
  static void staged_values(const Stage& from, const float* const* w, int R, int n, float* const* out) {
    CodedSource(from.rows, 0, 0).values(w, R, 0, n, out);
  }

 private:
  template <int BITS> void copy_codes(int j, const CodedHead<E>& there, int u) const {
    const char* from = h.v_unit(j / PAGE);
    char* to = there.v_unit(u / PAGE);
    for (int b = 0; b < c.d / LANES; b++, from += h.block(), to += h.block())
      Codes<BITS>::put_lanes(to, u % PAGE, Codes<BITS>::get(from, j % PAGE), VI{} - 1);
    const f16* scales = h.v_scales(j / PAGE) + j % PAGE;
    f16* copy = there.v_scales(u / PAGE) + u % PAGE;
    for (int i = 0; i < 2 * h.v_groups(); i += PAGE) copy[i] = scales[i];  // scales, then zeros
  }

  // --- pages assembled as floats

  template <int BITS> NOINLINE void k_tile(int j, float* tile) const {  // [d, 16]
    const char* blocks = h.k_blocks(j);
    const int u = j * PAGE / c.k_unit, t = j * PAGE % c.k_unit, n = c.group;
    const f16 *scales = h.k_scales(u), *zeros = scales + h.k_groups();
    int at[LANES];
    for (int i = 0; i < LANES; i++) at[i] = c.by_token ? i : (t + i) / n * c.d;
    for (int b = 0; b < c.d / LANES; b++)
      Codes<BITS>::each(blocks + b * h.block(), [&](int i, VU codes) {
        const int ch = b * LANES + i, first = c.by_token ? ch / n * PAGE : ch;
        float s[LANES], z[LANES];
        for (int l = 0; l < LANES; l++) {
          s[l] = to_float(scales[first + at[l]]);
          z[l] = to_float(zeros[first + at[l]]);
        }
        storev(tile + ch * PAGE, as_floats(codes) * loadv(s) + loadv(z));
      });
    if (k_done >= (j + 1) * PAGE) return;
    const E* page = h.k_page(j);
    for (int ch = 0; ch < c.d; ch++)
      for (int i = k_done - j * PAGE; i < PAGE; i++) tile[ch * PAGE + i] = to_float(page[ch * PAGE + i]);
  }
  template <int BITS> NOINLINE void v_tile(int j, float* tile) const {  // [16, d]
    const char* blocks = h.v_unit(j);
    const int n = c.group, coded = v_done - j * PAGE;
    const f16 *scales = h.v_scales(j), *zeros = scales + h.v_groups();
    for (int b = 0; b < c.d / LANES; b++)
      Codes<BITS>::each(blocks + b * h.block(), [&](int i, VU codes) {
        if (i >= coded) return;
        float s[LANES], z[LANES];
        for (int l = 0; l < LANES; l++) {
          const int at = (b * LANES + l) / n * PAGE + i;
          s[l] = to_float(scales[at]);
          z[l] = to_float(zeros[at]);
        }
        storev(tile + i * c.d + b * LANES, as_floats(codes) * loadv(s) + loadv(z));
      });
    if (coded >= PAGE) return;
    const E* page = h.v_page(j);
    for (int i = coded * c.d; i < PAGE * c.d; i++) tile[i] = to_float(page[i]);
  }

  // --- pages read as codes

  template <int BITS> NOINLINE void fused_scores(const float* const* q, int R, int j0, int n, float* const* s) const {
    CODE_CASES(coded_scores, R, q, R, j0, n, s)
  }
  // By channel: sum over channels of code * (q * scale), plus q . zero which is the same for all tokens of a
  // group. By token, for each group of channels: sum of code * q, times the tokens' scales, plus their zeros
  // times the sum of q.
  template <int BITS, int R> void coded_scores(const float* const* q, int rows, int j0, int n, float* const* s) const {
    constexpr int C = columns(R);
    const int d = c.d, width = c.by_token ? c.group : d;
    const V fold = fold_down<BITS>();
    float qs[2][R][MOST_D], qz[2][R] = {}, total[R][MOST_D / LANES];
    int folded[2] = {-1, -1};  // the groups of tokens that qs and qz are for
    for (int r = 0; r < R && c.by_token; r++) {
      const float* x = q[r < rows ? r : rows - 1];
      for (int i = 0; i < d; i += LANES) storev(qs[0][r] + i, loadv(x + i) * fold);
      for (int g = 0; g < d / width; g++) total[r][g] = sum_of(x + g * width, width);
    }
    for (int j = j0; j < j0 + n; j += C) {
      const char* blocks[C];
      const float* w[R][C];
      int page[C], set[C];
      for (int k = 0; k < C; k++) {
        page[k] = j + k < j0 + n ? j + k : j0 + n - 1;
        blocks[k] = h.k_blocks(page[k]);
        const int u = page[k] * PAGE / c.k_unit;
        set[k] = c.by_token ? 0 : u & 1;
        if (!c.by_token && folded[u & 1] != u) {
          folded[u & 1] = u;
          const f16* scales = h.k_scales(u);
          for (int r = 0; r < R; r++)
            qz[u & 1][r] = fold_row(q[r < rows ? r : rows - 1], scales, scales + d, d / LANES, fold, qs[u & 1][r]);
        }
        for (int r = 0; r < R; r++) w[r][k] = qs[set[k]][r];
      }
      V sum[R][C] = {};
      for (int g = 0; g < d / width; g++) {
        Part acc[R][C][PARTS] = {};
        for (int i = 0; i < width; i += LANES) {
          add_codes<BITS, R, C>(blocks, w, acc);
          for (int k = 0; k < C; k++) {
            blocks[k] += 32 * BITS;
            for (int r = 0; r < R; r++) w[r][k] += LANES;
          }
        }
        for (int k = 0; k < C; k++) {
          const f16* scales = c.by_token ? h.k_scales(page[k]) + g * PAGE : nullptr;
          for (int r = 0; r < R; r++) {
            if (c.by_token) {
              sum[r][k] += join(acc[r][k]) * load16(scales);
              sum[r][k] += load16(scales + h.k_groups()) * total[r][g];
            } else {
              sum[r][k] = join(acc[r][k]) + qz[set[k]][r];
            }
          }
        }
      }
      for (int k = 0; k < C; k++)
        for (int r = 0; r < R; r++) storev(s[r < rows ? r : rows - 1] + (page[k] - j0) * PAGE, sum[r][k]);
    }
  }
  template <int BITS> NOINLINE void fused_values(const float* const* w, int R, int j0, int n, float* const* out) const {
    CODE_CASES(coded_values, R, w, R, j0, n, out)
  }
  // For each group of channels: out += sum over tokens of code * (weight * scale), plus weight . zero.
  template <int BITS, int R> void coded_values(const float* const* w, int rows, int j0, int n, float* const* out) const {
    constexpr int C = columns(R);
    const V fold = fold_down<BITS>();
    float ws[C][R][SUPER], wz[C][R] = {};
    const char* units[SUPER / PAGE];
    for (int j = 0; j < n; j++) units[j] = h.v_unit(j0 + j);
    int folded[C];  // the groups of channels that ws and wz are for
    for (int k = 0; k < C; k++) folded[k] = -1;
    for (int b = 0; b < c.d / LANES; b += C) {
      Part acc[R][C][PARTS];
      float* to[R][C];
      int block[C], set[C];
      for (int k = 0; k < C; k++) {
        block[k] = b + k < c.d / LANES ? b + k : b;
        const int g = block[k] * LANES / c.group;
        set[k] = g % C;
        if (folded[g % C] != g) {
          folded[g % C] = g;
          const f16* scales[SUPER / PAGE];
          for (int j = 0; j < n; j++) scales[j] = (const f16*)(units[j] + c.d / LANES * 32 * BITS) + g * PAGE;
          for (int r = 0; r < R; r++)
            wz[g % C][r] = fold_pages(w[r < rows ? r : rows - 1], scales, h.v_groups(), n, fold, ws[g % C][r]);
        }
        for (int r = 0; r < R; r++) {
          to[r][k] = out[r < rows ? r : rows - 1] + block[k] * LANES;
          const V x = loadv(to[r][k]) + wz[set[k]][r];
          memcpy(acc[r][k], &x, sizeof x);
        }
      }
      for (int j = 0; j < n; j++) {
        const char* blocks[C];
        const float* at[R][C];
        for (int k = 0; k < C; k++) {
          blocks[k] = units[j] + block[k] * 32 * BITS;
          for (int r = 0; r < R; r++) at[r][k] = ws[set[k]][r] + j * PAGE;
        }
        add_codes<BITS, R, C>(blocks, at, acc);
      }
      for (int k = 0; k < C; k++)
        for (int r = 0; r < R; r++) storev(to[r][k], join(acc[r][k]));
    }
  }
};

template <class E> static inline CodedSource<E> source_of(const Coded& c, int seq, int g) { return CodedSource<E>(c, seq, g); }
