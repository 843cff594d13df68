// Vectors of floats as wide as the processor's registers, by the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>

namespace muster {

#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef float UnalignedVector __attribute__((vector_size(kVectorBytes), aligned(4)));

typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongVector __attribute__((vector_size(kVectorBytes)));

inline Vector splat(float value) { return value - Vector{}; }

inline Vector as_floats(IntVector bits) {
  Vector value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline IntVector as_ints(LongVector bits) {
  IntVector value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }

inline void store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }

// The first `count` lanes only; a vector that is whole in one move.
inline void store_part(float* to, Vector value, int64_t count) {
  if (count >= kLanes) {
    store(to, value);
  } else if (count > 0) {
    std::memcpy(to, &value, sizeof(float) * count);
  }
}

// `rest` where there are no more.
inline Vector load_part(const float* from, int64_t count, float rest = 0.0f) {
  if (count >= kLanes) return load(from);
  Vector value = splat(rest);
  if (count > 0) std::memcpy(&value, from, sizeof(float) * count);
  return value;
}

}  // namespace muster
