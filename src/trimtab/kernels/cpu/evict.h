// Scores of rows by the attention they receive, and dropping the lowest (H2O).
#pragma once
#include "attention.h"

struct Heavy {  // of one span, mirrored in kernels/native.py
  float* score;       // [L, G, capacity]
  int32_t* position;  // [L, G, capacity], of each row in the text
  i64 capacity;
  i64 first;   // position of the span's first row
  i64 keep;    // rows that a head keeps
  i64 recent;  // rows at this position and later stay
};

// Puts row `from` of a head in the place of row `to`.
template <class E> static void move_row(const Paged& c, int seq, int g, int from, int to) {
  const E* a = page_ptr<E>(c, page_of(c, seq, g, from / PAGE));
  E* b = page_ptr<E>(c, page_of(c, seq, g, to / PAGE));
  for (int i = 0; i < c.d; i++) b[i * PAGE + to % PAGE] = a[i * PAGE + from % PAGE];
  memcpy((void*)(b + PAGE * c.d + to % PAGE * c.d), a + PAGE * c.d + from % PAGE * c.d, c.d * sizeof(E));
}

// For one head of one layer: new rows get a score, all rows what the span's queries gave them, and then the
// lowest rows older than `recent` are dropped one by one, the last row taking the place.
template <class E>
static void heavy_head(const Paged& c, Scratch& w, const float* q, const float* lse, int span, int g, float* score,
                       int32_t* position, const Heavy& y) {
  const int32_t* s = c.spans + span * 3;
  const int base = held(c, s[0], g), n_new = s[2] - s[1];
  for (int i = 0; i < n_new; i++) {
    score[base + i] = 0;
    position[base + i] = (int32_t)(y.first + i);
  }
  column_sums(c, source_of<E>(c, c.spans[span * 3], g), w, q, lse, nullptr, span, g, 0, score);
  for (int total = base + n_new; total > y.keep; total--) {
    int victim = -1;
    for (int j = 0; j < total; j++)
      if (position[j] < y.recent && (victim < 0 || score[j] < score[victim])) victim = j;
    if (victim < 0) return;
    const int last = total - 1;
    if (victim != last) move_row<E>(c, s[0], g, last, victim);
    score[victim] = score[last];
    position[victim] = position[last];
  }
}

// The same for all spans, layers and heads of a step; q [L, n, H, d] and lse [L, n, H] of its rows.
template <class E>
static void heavy_hitters(Team& team, const Paged& rows, int L, int n, const float* q, const float* lse, const Heavy* each) {
  std::vector<Scratch> scratch(team.size);
  for (auto& w : scratch) w.size(rows.d);
  const i64 items = (i64)rows.n_spans * rows.G;
  team.next = 0;
  team.run([&](int t) {
    for (i64 at = team.take(); at < items * L; at = team.take()) {
      const int layer = (int)(at / items), span = (int)(at % items / rows.G), g = (int)(at % rows.G);
      Paged c = rows;
      for (int i = 0; i < layer; i++) next_layer(c);
      const Heavy& y = each[span];
      const i64 row = ((i64)layer * rows.G + g) * y.capacity;
      heavy_head<E>(c, scratch[t], q + (i64)layer * n * c.H * c.d, lse + (i64)layer * n * c.H, span, g, y.score + row,
                    y.position + row, y);
    }
  });
}
