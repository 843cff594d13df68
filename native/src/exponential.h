// The exponential function, lane by lane.
#pragma once

#include <initializer_list>

#include "vectors.h"

namespace muster {

// e^x within 2 units in the last place; what overflows is e^88, what underflows e^-87.
inline Vector exp_of(Vector x) {
  const Vector least = splat(-87.0f), most = splat(88.0f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Vector scaled = x * splat(1.44269504088896341f);
  const IntVector whole = __builtin_convertvector(scaled + (scaled > splat(0.0f) ? splat(0.5f) : splat(-0.5f)), IntVector);
  const Vector power = __builtin_convertvector(whole, Vector);
  // ln 2 in two parts, the first of few bits: power times it is exact.
  const Vector rest = (x - power * splat(0.693359375f)) + power * splat(2.12194440e-4f);
  Vector sum = splat(1.9875691500e-4f);
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    sum = sum * rest + splat(next);
  }
  sum = sum * rest * rest + rest + splat(1.0f);
  return sum * as_floats((whole + 127) << 23);
}

}  // namespace muster
