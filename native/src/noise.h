// Gumbel noise of a token as a function of (seed, position, token id) and nothing else, by splitmix64's output function
// ("Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Its hash is torch_sampler.py's bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "vectors.h"

namespace muster {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Of one number or of a vector of them.
template <class Bits>
inline Bits mixed(Bits x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

inline uint64_t noise_key(uint64_t seed, int64_t position) {
  const uint64_t of_seed = mixed(seed + kGolden);
  return mixed((of_seed ^ (static_cast<uint64_t>(position) * kGolden)) + kGolden);
}

// -log(-log(u)) of u in (0, 1).
inline float noise(uint64_t key, int64_t token) {
  const uint64_t bits = mixed(key + static_cast<uint64_t>(token) * kGolden);
  const double u = (static_cast<double>(bits >> 12) + 0.5) / static_cast<double>(1ull << 52);
  return -static_cast<float>(std::log(-std::log(u)));
}

template <int... kLane>
inline IntVector upper_halves(LongVector first, LongVector second, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(as_ints(first), as_ints(second), (2 * kLane + 1)...);
}

// Of the kLanes tokens from `first` on: 1 - u, or up to 2^-31 less.
inline Vector noise_rests(uint64_t key, int64_t first) {
  LongVector low{}, high{};
  for (int lane = 0; lane < kLanes / 2; ++lane) {
    low[lane] = lane * kGolden;
    high[lane] = (lane + kLanes / 2) * kGolden;
  }
  const uint64_t base = key + static_cast<uint64_t>(first) * kGolden;
  const IntVector upper =
      upper_halves(~mixed(low + base), ~mixed(high + base), std::make_integer_sequence<int, kLanes>{});
  return __builtin_convertvector((upper >> 1) & 0x7FFFFFFF, Vector) * splat(1.0f / 2147483648.0f);
}

}  // namespace muster
