// Products with a packed weight.

#include "activation.h"
#include "panels.h"
#include "threads.h"

namespace muster {
namespace {

// Packs `count` rows of weight, each `stride` floats after the one before, into the lanes from `lane` on of one panel.
void pack_lanes(const float* weight, int64_t stride, int64_t count, int64_t in, float* panel, int lane, int lanes) {
  for (int64_t k = 0; k < in; ++k) {
    for (int at = 0; at < lanes; ++at) panel[k * kPanel + lane + at] = at < count ? weight[at * stride + k] : 0.0f;
  }
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Floats of a vector.
int muster_lanes() { return kLanes; }

// Floats that a weight [out, in] takes when it is packed.
int64_t muster_packed_floats(int64_t out, int64_t in) { return num_panels(out) * kPanel * in; }

// Floats that a gate and an up of [units, in] each take as panels of pairs.
int64_t muster_packed_pair_floats(int64_t units, int64_t in) { return num_pair_panels(units) * kPanel * in; }

// Packs weight [out, in], whose rows are `stride` floats apart, into `packed`.
void muster_pack(const float* weight, int64_t stride, int64_t out, int64_t in, float* packed, int threads) {
  in_shares(num_panels(out), threads, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel;
      pack_lanes(weight + first * stride, stride, out - first, in, packed + first * in, 0, kPanel);
    }
  });
}

// Packs gate and up [units, in], whose rows are `stride` floats apart, into panels of pairs.
void muster_pack_pairs(const float* gate, const float* up, int64_t stride, int64_t units, int64_t in, float* packed,
                       int threads) {
  in_shares(num_pair_panels(units), threads, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kLanes;
      float* to = packed + panel * kPanel * in;
      pack_lanes(gate + first * stride, stride, units - first, in, to, 0, kLanes);
      pack_lanes(up + first * stride, stride, units - first, in, to, kLanes, kLanes);
    }
  });
}

// y [rows, out] = x [rows, in] times the packed weight, and bias [out] where it is not null. Strides are in floats.
void muster_product(const float* x, int64_t x_stride, int64_t rows, const float* packed, const float* bias, int64_t out,
                    int64_t in, float* y, int64_t y_stride, int threads) {
  in_shares(num_panels(out), threads, [=](int64_t begin, int64_t end) {
    const auto take = [=](int64_t row, int64_t panel, Vector left, Vector right) {
      const int64_t output = panel * kPanel, count = out - output;
      if (bias != nullptr) {
        left += load_part(bias + output, count);
        right += load_part(bias + output + kLanes, count - kLanes);
      }
      store_part(y + row * y_stride + output, left, count);
      store_part(y + row * y_stride + output + kLanes, right, count - kLanes);
    };
    multiply(rows, [=](int64_t row) { return x + row * x_stride; }, packed, in, begin, end, take);
  });
}

// y [rows, units] = activation(x times the packed pairs); bias [2][units], gates and then ups, where it is not null.
void muster_gated_product(const float* x, int64_t x_stride, int64_t rows, const float* packed, const float* bias,
                          int64_t units, int64_t in, float alpha, float up_offset, float limit, float* y,
                          int64_t y_stride, int threads) {
  const Activation by{alpha, up_offset, limit};
  in_shares(num_pair_panels(units), threads, [=](int64_t begin, int64_t end) {
    const auto take = [=](int64_t row, int64_t panel, Vector gate, Vector up) {
      const int64_t unit = panel * kLanes, count = units - unit;
      if (bias != nullptr) {
        gate += load_part(bias + unit, count);
        up += load_part(bias + units + unit, count);
      }
      store_part(y + row * y_stride + unit, activate(gate, up, by), count);
    };
    multiply(rows, [=](int64_t row) { return x + row * x_stride; }, packed, in, begin, end, take);
  });
}

}  // extern "C"
