// Sums, and the largest, across the lanes of vectors.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

namespace muster {

// Of a and b in groups of 2 * kHalf lanes: the first or the second half of a's group, and then the same of b's.
template <int kHalf, bool kSecond, int... kLane>
inline Vector halves(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b,
                                 (kLane / (2 * kHalf) * (2 * kHalf) + kLane % kHalf + (kSecond ? kHalf : 0) +
                                  (kLane % (2 * kHalf) >= kHalf ? kLanes : 0))...);
}

// sums[i], for i below `kCount`, are added pairwise until one vector is left whose lane i is the sum over sums[i]'s lanes.
template <int kCount = kLanes>
inline Vector sum_each(Vector* sums) {
  if constexpr (kCount == 1) {
    return sums[0];
  } else {
    constexpr int kHalf = kCount / 2;
    using Lanes = std::make_integer_sequence<int, kLanes>;
    for (int at = 0; at < kHalf; ++at) {
      sums[at] = halves<kHalf, false>(sums[at], sums[at + kHalf], Lanes{}) +
                 halves<kHalf, true>(sums[at], sums[at + kHalf], Lanes{});
    }
    return sum_each<kHalf>(sums);
  }
}

inline float sum_of(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

inline float largest_of(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = std::max(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

}  // namespace muster
