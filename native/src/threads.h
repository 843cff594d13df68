// Even shares of work for the threads of one call.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace muster {

// Calls work(begin, end) for consecutive parts of [0, count), each on a thread of its own; for one thread in the caller,
// so that a rank with one core never starts the runtime.
template <class Work>
void in_shares(int64_t count, int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), size = omp_get_num_threads();
      work(count * thread / size, count * (thread + 1) / size);
    }
    return;
  }
#endif
  work(0, count);
}

// Calls work(item) for each item below `count`, each on the thread that is free next: for items of uneven length.
template <class Work>
void in_turns(int64_t count, int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < count; ++item) work(item);
    return;
  }
#endif
  for (int64_t item = 0; item < count; ++item) work(item);
}

}  // namespace muster
