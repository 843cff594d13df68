// (up + up_offset) * gate * sigmoid(alpha * gate), with gate and up cut to a limit before, lane by lane.
#pragma once

#include "exponential.h"
#include "vectors.h"

namespace muster {

struct Activation {
  float alpha;
  float up_offset;
  float limit;  // infinity for none
};

// Comparisons are such that a NaN stays one.
inline Vector activate(Vector gate, Vector up, const Activation& by) {
  const Vector limit = splat(by.limit);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  const Vector sigmoid = splat(1.0f) / (splat(1.0f) + exp_of(-splat(by.alpha) * gate));
  return (up + splat(by.up_offset)) * (gate * sigmoid);
}

}  // namespace muster
