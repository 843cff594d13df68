// Sleeping until another process has changed something in shared memory.
#pragma once

#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

#include <atomic>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace muster {

constexpr int64_t kLine = 128;  // two cache lines: processors fetch them in pairs

using Time = std::chrono::steady_clock;

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What one rank listens to, whatever it waits for. Who has changed something that it may wait for rings: a system call
// only where somebody sleeps.
struct alignas(kLine) Bell {
  std::atomic<uint32_t> rings;
  std::atomic<uint32_t> sleepers;

  // Sequentially consistent, as what was changed before has to be: either this sees the sleeper, or the sleeper,
  // which has counted itself before it looked, sees the change.
  void ring() {
    if (sleepers.load() == 0) return;
    rings.fetch_add(1);
    syscall(SYS_futex, &rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // Returns at a ring since `seen` was read, or after `most`, or now and then for no reason.
  void sleep(uint32_t seen, std::chrono::milliseconds most) {
    const timespec limit{most.count() / 1000, most.count() % 1000 * 1000000};
    syscall(SYS_futex, &rings, FUTEX_WAIT, seen, &limit, nullptr, 0);
  }
};

// Counts a sleeper of a bell while it lives.
class Listening {
 public:
  explicit Listening(Bell& bell) : bell_(bell) { bell_.sleepers.fetch_add(1); }
  ~Listening() { bell_.sleepers.fetch_sub(1); }
  Listening(const Listening&) = delete;
  Listening& operator=(const Listening&) = delete;

 private:
  Bell& bell_;
};

}  // namespace muster
