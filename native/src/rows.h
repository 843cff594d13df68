// What is done to each row by itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sums.h"
#include "threads.h"
#include "vectors.h"

namespace muster {

// Rows of less than this many floats in all are one thread's: to wake another takes longer.
constexpr int64_t kLeastPerThread = 1 << 15;

inline int threads_for(int64_t floats, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, floats / kLeastPerThread)));
}

// y = x over the root of its mean square, times weight; y may be x.
inline void normalise(const float* x, const float* weight, int64_t width, float eps, float* y) {
  Vector squares{};
  for (int64_t at = 0; at < width; at += kLanes) {
    const Vector part = load_part(x + at, width - at);
    squares += part * part;
  }
  const Vector factor = splat(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps));
  for (int64_t at = 0; at < width; at += kLanes) {
    const int64_t left = width - at;
    store_part(y + at, load_part(x + at, left) * factor * load_part(weight + at, left), left);
  }
}

// Element i of the first 2 * half pairs with element i + half; what is behind them stays. y may be x.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t width, float* y) {
  for (int64_t at = 0; at < half; at += kLanes) {
    const int64_t count = half - at;
    const Vector left = load_part(x + at, count), right = load_part(x + half + at, count);
    const Vector c = load_part(cos + at, count), s = load_part(sin + at, count);
    store_part(y + at, left * c - right * s, count);
    store_part(y + half + at, right * c + left * s, count);
  }
  if (x != y) std::copy(x + 2 * half, x + width, y + 2 * half);
}

}  // namespace muster
