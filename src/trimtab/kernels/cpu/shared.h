// Attention to a beginning that several texts share: queries of all of them against one copy of the pages.
//
// Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes, 2024, arXiv 2402.05099. As
// there, but instead of merging segments each row carries its running softmax from the shared superblocks on
// to its own ones: the same operations in the same order as alone, so sharing does not change a bit of the result.
#pragma once
#include "attention.h"

// Superblocks [first, end) that lie in the same pages for all of `spans`.
struct SharedRun {
  int first, end;
  std::vector<int> spans, rows;  // rows: numbers of all their new rows
};

struct SharedRuns {
  std::vector<std::vector<SharedRun>> levels;  // a run's rows come out of a run of the level before, or start there
  bool any() const { return !levels.empty(); }

  // Finds who shares what; `begun` becomes the keys of each span that are shared.
  void find(const Paged& c, std::vector<int>& begun) {
    levels.clear();
    begun.assign(c.n_spans, 0);
    if (!c.share || c.n_spans < 2 || c.table_head || c.head_window) return;
    std::vector<int> all;
    for (int s = 0; s < c.n_spans; s++)
      if (c.spans[s * 3 + 2] > c.spans[s * 3 + 1]) all.push_back(s);
    split(c, all, 0, 0, begun);
  }

 private:
  static const int32_t* table(const Paged& c, int span) { return c.table + c.spans[span * 3] * c.table_seq; }
  static bool has(const Paged& c, int span, int block) { return held(c, c.spans[span * 3], 0) >= (block + 1) * SUPER; }
  static bool alike(const Paged& c, int a, int b, int block) {
    constexpr int N = SUPER / PAGE;
    return has(c, b, block) && !memcmp(table(c, a) + block * N, table(c, b) + block * N, N * sizeof(int32_t));
  }
  void split(const Paged& c, std::vector<int> spans, int block, size_t level, std::vector<int>& begun) {
    while (spans.size() > 1) {
      const int lead = spans[0];
      std::vector<int> same, rest;
      for (int s : spans) (has(c, lead, block) && alike(c, lead, s, block) ? same : rest).push_back(s);
      if (same.empty()) rest.erase(rest.begin());
      spans = std::move(rest);
      if (same.size() < 2) continue;
      auto whole = [&](int at) {
        for (int s : same)
          if (!has(c, lead, at) || !alike(c, lead, s, at)) return false;
        return true;
      };
      SharedRun run{block, block + 1, same, {}};
      while (whole(run.end)) run.end++;
      for (int s : same) {
        begun[s] = run.end * SUPER;
        for (int r = c.spans[s * 3 + 1]; r < c.spans[s * 3 + 2]; r++) run.rows.push_back(r);
      }
      if (levels.size() <= level) levels.resize(level + 1);
      const int next = run.end;
      levels[level].push_back(std::move(run));
      split(c, same, next, level + 1, begun);
    }
  }
};

// Takes the rows of one tile of a run through its superblocks, for KV head g.
template <class Source>
static void attend_run(const Paged& c, const Source& source, Scratch& w, States& states, const float* q, const SharedRun& run,
                       int g, int pair0, int R) {
  const int group = c.H / c.G, d = c.d, RT = R <= 8 ? R : 16;
  const float *qp[MAX_ROWS], *pp[MAX_ROWS];
  float *sp[MAX_ROWS], *op[MAX_ROWS], *state[MAX_ROWS];
  Row rows[MAX_ROWS];
  for (int r = 0; r < RT; r++) {
    const int pair = pair0 + (r < R ? r : R - 1), row = run.rows[pair / group], head = g * group + pair % group;
    const float* src = q + ((i64)row * c.H + head) * d;
    float* dst = w.q.data() + (i64)r * d;
    for (int k = 0; k < d; k++) dst[k] = src[k] * c.scale;
    qp[r] = dst;
    op[r] = rows[r].out = w.out.data() + (i64)r * d;
    pp[r] = sp[r] = w.s.data() + (i64)r * SUPER;
    state[r] = states.at(c, row, head);
    if (run.first) {
      rows[r].m = state[r][0];
      rows[r].l = state[r][1];
      memcpy(op[r], state[r] + 2, d * sizeof(float));
    } else {
      memset(op[r], 0, d * sizeof(float));
    }
  }
  for (int sb = run.first * SUPER; sb < run.end * SUPER; sb += SUPER) {
    source.scores(qp, RT, sb, SUPER / PAGE, sp);
    for (int r = 0; r < RT; r++) take_scores(rows[r], sp[r], SUPER, d);
    source.values(pp, RT, sb, SUPER, op);
  }
  for (int r = 0; r < R; r++) {
    state[r][0] = rows[r].m;
    state[r][1] = rows[r].l;
    memcpy(state[r] + 2, op[r], d * sizeof(float));
  }
}

// All runs, level by level; every thread calls it between two barriers and it ends with one.
template <class SourceOf>
static void attend_shared(Team& team, int t, const Paged& c, const SharedRuns& runs, const SourceOf& source_of, Scratch& w,
                          States& states, const float* q) {
  const int group = c.H / c.G;
  for (const auto& level : runs.levels) {
    i64 want = team.take(), at = 0;
    for (const SharedRun& run : level) {
      const int pairs = (int)run.rows.size() * group, tiles = (pairs + MAX_ROWS - 1) / MAX_ROWS;
      for (; want < at + (i64)tiles * c.G; want = team.take()) {
        const int g = (int)((want - at) / tiles), tile = (int)((want - at) % tiles), left = pairs - tile * MAX_ROWS;
        attend_run(c, source_of(c.spans[run.spans[0] * 3], g), w, states, q, run, g, tile * MAX_ROWS,
                   left < MAX_ROWS ? left : MAX_ROWS);
      }
      at += (i64)tiles * c.G;
    }
    team.barrier(t);
  }
}
