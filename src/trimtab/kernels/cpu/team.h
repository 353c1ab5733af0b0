// A team of threads that spins between the phases of one step and sleeps between steps.
//
// A decode step of a small model has dozens of phases of a few microseconds each; waking threads through
// the kernel for each would cost more than the work. Inside a step threads meet at a spin barrier. Where other
// programs want the same cores a partner may be off its core for milliseconds; a team that loses much of a
// step that way works alone for a while and then tries again. Results never depend on the number of threads.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Team {
  int size = 1;  // threads there are
  int n = 1;     // threads at work in this run
  double alone_until = 0, alone_for = 2e-3;  // seconds: when to try again, and how long to wait next time
  double lost = 0;                           // seconds the first thread waited for partners in this run
  std::vector<std::thread> threads;
  std::atomic<uint64_t> epoch{0};
  std::atomic<int> arrived{0};
  std::atomic<uint32_t> turn{0};
  std::atomic<int> running{0};
  std::atomic<bool> quit{false};
  std::mutex m;
  std::condition_variable cv;
  std::function<void(int)> job;
  std::atomic<i64> next{0};  // shared work counter of the current phase

  explicit Team(int count) : size(count) {
    for (int t = 1; t < size; t++) threads.emplace_back([this, t] { work(t); });
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(m);
      quit = true;
      epoch++;
    }
    cv.notify_all();
    for (auto& t : threads) t.join();
  }
  void work(int t) {
    uint64_t seen = 0;
    for (;;) {
      // Stay hot for the gap between two decode steps, then give the core back.
      for (int i = 0; i < 4000 && epoch.load(std::memory_order_acquire) == seen; i++) relax();
      if (epoch.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(m);
        cv.wait(lock, [&] { return epoch.load() != seen; });
      }
      seen = epoch.load();
      if (quit) return;
      job(t);
      running.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  // Runs f(thread index) on every thread and returns when all are done.
  void run(std::function<void(int)> f) {
    double begin = now();
    n = begin < alone_until ? 1 : size;
    if (n == 1) return f(0);
    job = std::move(f);
    running = n - 1;
    lost = 0;
    {
      std::lock_guard<std::mutex> lock(m);
      epoch++;
    }
    cv.notify_all();
    job(0);
    lost += spin([&] { return running.load(std::memory_order_acquire) == 0; });
    double end = now();
    if (lost > 3e-4 && lost > 0.5 * (end - begin)) {
      alone_until = end + alone_for;
      alone_for = alone_for < 2e-2 ? alone_for * 2 : alone_for;
    } else if (alone_for > 2e-3) {
      alone_for *= 0.9;
    }
  }
  void barrier(int t) {
    if (n == 1) {
      next = 0;
      return;
    }
    uint32_t mine = turn.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      turn.store(mine + 1, std::memory_order_release);
    } else {
      double waited = spin([&] { return turn.load(std::memory_order_acquire) != mine; });
      if (t == 0) lost += waited;
    }
  }
  // Waits for `done`; gives the core away after a while, since the partner may need it. Seconds beyond that.
  template <class Done> static double spin(Done done) {
    for (int i = 0; i < 300; i++) {
      if (done()) return 0;
      relax();
    }
    double begin = now();
    while (!done()) std::this_thread::yield();
    return now() - begin;
  }
  i64 take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

struct Range { int begin, end; };
// The share of `count` items of thread t, cut at multiples of `unit`.
static inline Range share(int count, int unit, int t, int n) {
  int units = (count + unit - 1) / unit;
  int b = (int)((i64)units * t / n) * unit, e = (int)((i64)units * (t + 1) / n) * unit;
  return {b < count ? b : count, e < count ? e : count};
}
