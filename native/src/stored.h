// Weights as they are stored: float32, or halves that are widened as they are read. All arithmetic is float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace muster {

constexpr int kPanel = 2 * kLanes;

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The weights of one panel for one k.
struct Pair {
  Vector left;
  Vector right;
};

inline Pair widen(const float* from) { return {load(from), load(from + kLanes)}; }

// A word holds a weight of the left vector in its low half and one of the right in its high: both are floats whose low
// bits are gone, so a shift and a mask widen them.
inline Pair widen(const Bfloat16* from) {
  IntVector words;
  std::memcpy(&words, from, sizeof(words));
  return {as_floats(words << 16), as_floats(words & static_cast<int32_t>(0xffff0000))};
}

inline Pair widen(const Float16* from) {
#ifdef __AVX512F__
  const __m256i* halves = reinterpret_cast<const __m256i*>(from);
  // All lanes by a mask: without one GCC 12 warns of what its own header leaves undefined.
  return {Vector(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(halves))),
          Vector(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(halves + 1)))};
#else
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  return {Vector(_mm256_cvtph_ps(_mm_loadu_si128(halves))), Vector(_mm256_cvtph_ps(_mm_loadu_si128(halves + 1)))};
#endif
}

// Where the weight of a lane of the panel stands among the kPanel of one k.
inline int place_of(int lane, const Bfloat16*) { return lane < kLanes ? 2 * lane : 2 * (lane - kLanes) + 1; }
inline int place_of(int lane, const float*) { return lane; }
inline int place_of(int lane, const Float16*) { return lane; }

// The types by their numbers in the C interface.
enum Stored : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Calls work(pointer) with `weights` as what `stored` says it is.
template <class Work>
void as_stored(int stored, const void* weights, Work work) {
  switch (stored) {
    case kBfloat16: return work(static_cast<const Bfloat16*>(weights));
    case kFloat16: return work(static_cast<const Float16*>(weights));
    default: return work(static_cast<const float*>(weights));
  }
}

}  // namespace muster
