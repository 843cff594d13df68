// One rank of a group: who the others are, whether they live, and how it waits for them.
#pragma once

#include <csignal>
#include <vector>

#include <poll.h>
#include <sched.h>

#include "group_memory.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace muster {

// How a call ended; together with the rank that it waited for, see `ended`.
enum Status : int64_t { kDone = 0, kLost = 1, kSilent = 2, kClosed = 3, kUnequal = 4 };

inline int64_t ended(Status status, int64_t rank) { return status | rank << 8; }

class Peers {
 public:
  // `spin` is how long a wait keeps its core at first, and `timeout` how long it may take.
  Peers(GroupMemory memory, int64_t index, std::chrono::microseconds spin, std::chrono::duration<double> timeout)
      : memory_(memory), index_(index), spin_(spin), timeout_(timeout), handles_(memory.shape().size, -1) {
    own().process.store(getpid());
    ring_all();
  }

  ~Peers() {
    for (const int handle : handles_) {
      if (handle >= 0) close(handle);
    }
  }

  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  const GroupMemory& memory() const { return memory_; }
  int64_t index() const { return index_; }
  int64_t size() const { return memory_.shape().size; }
  Member& own() const { return memory_.member(index_); }

  // Waits until every rank has joined, and learns how to tell whether it lives.
  int64_t meet(std::chrono::duration<double> timeout) {
    for (int64_t rank = 0; rank < size(); ++rank) {
      std::atomic<int32_t>& process = memory_.member(rank).process;
      const auto has_joined = [&] { return process.load() != 0; };
      const int64_t end = wait(has_joined, [&](int64_t other) { return other == rank; }, [] {}, timeout);
      if (end != kDone) return end;
      if (process.load() != getpid()) handles_[rank] = syscall(SYS_pidfd_open, process.load(), 0);
    }
    return kDone;
  }

  // From any thread: this rank's waits end, and those for this rank.
  void leave() {
    own().is_closed.store(1);
    own().bell.ring();
    ring_all();
  }

  bool has_left(int64_t rank) const { return memory_.member(rank).is_closed.load() != 0; }

  void ring(int64_t rank) const { memory_.member(rank).bell.ring(); }

  void ring_all() const {
    for (int64_t rank = 0; rank < size(); ++rank) {
      if (rank != index_) ring(rank);
    }
  }

  // Waits until `ready()`, which only ranks with `is_awaited(rank)` can make true; `help()` is called now and then.
  template <class Ready, class IsAwaited, class Help>
  int64_t wait(Ready ready, IsAwaited is_awaited, Help help) const {
    return wait(ready, is_awaited, help, timeout_);
  }

 private:
  static constexpr int kYields = 20;
  // After so long a sleeper looks at what cannot ring: the death of a process.
  static constexpr std::chrono::milliseconds kSleep{5};

  template <class Ready, class IsAwaited, class Help>
  int64_t wait(Ready ready, IsAwaited is_awaited, Help help, std::chrono::duration<double> timeout) const {
    if (ready()) return kDone;
    for (const Time::time_point end = Time::now() + spin_; Time::now() < end;) {
      for (int turn = 0; turn < 32; ++turn) {
        pause_core();
        if (ready()) return kDone;
      }
    }
    for (int turn = 0; turn < kYields; ++turn) {
      help();
      sched_yield();
      if (ready()) return kDone;
    }
    return sleep(ready, is_awaited, help, timeout);
  }

  template <class Ready, class IsAwaited, class Help>
  int64_t sleep(Ready ready, IsAwaited is_awaited, Help help, std::chrono::duration<double> timeout) const {
    Bell& bell = own().bell;
    const Listening listening(bell);
    const Time::time_point start = Time::now();
    Time::time_point looked = start;
    for (;;) {
      const uint32_t rings = bell.rings.load();
      help();
      if (ready()) return kDone;
      if (has_left(index_)) return ended(kClosed, index_);
      const Time::time_point now = Time::now();
      const bool looks = now - looked >= kSleep;
      if (looks) looked = now;
      for (int64_t rank = 0; rank < size(); ++rank) {
        if (rank == index_ || !(has_left(rank) || (looks && is_dead(rank)))) continue;
        // Only now: what it did before it went counts.
        if (ready()) return kDone;
        if (is_awaited(rank)) return ended(kLost, rank);
      }
      if (now - start > timeout) return ended(kSilent, first_awaited(is_awaited));
      bell.sleep(rings, kSleep);
    }
  }

  template <class IsAwaited>
  int64_t first_awaited(IsAwaited is_awaited) const {
    int64_t rank = 0;
    while (rank + 1 < size() && (rank == index_ || !is_awaited(rank))) ++rank;
    return rank;
  }

  // A process that nobody has reaped is dead too.
  bool is_dead(int64_t rank) const {
    const int32_t process = memory_.member(rank).process.load();
    if (process == 0 || process == getpid()) return false;
    if (handles_[rank] < 0) return kill(process, 0) != 0 && errno == ESRCH;
    pollfd polled{handles_[rank], POLLIN, 0};
    return poll(&polled, 1, 0) > 0;
  }

  GroupMemory memory_;
  int64_t index_;
  std::chrono::microseconds spin_;
  std::chrono::duration<double> timeout_;
  std::vector<int> handles_;  // of the processes; below 0 where there is none
};

}  // namespace muster
