// Products with a packed weight.

#include <type_traits>

#include "activation.h"
#include "product.h"

namespace muster {
namespace {

// Packs `count` rows of weight, each `stride` elements after the one before, into the lanes from `lane` on of one panel.
template <class Weight>
void pack_lanes(const Weight* weight, int64_t stride, int64_t count, int64_t in, Weight* panel, int lane, int lanes) {
  for (int64_t k = 0; k < in; ++k) {
    for (int at = 0; at < lanes; ++at) {
      panel[k * kPanel + place_of(lane + at, weight)] = at < count ? weight[at * stride + k] : Weight{};
    }
  }
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Floats of a vector.
int muster_lanes() { return kLanes; }

// Elements that a weight [out, in] takes when it is packed.
int64_t muster_packed_size(int64_t out, int64_t in) { return num_panels(out) * kPanel * in; }

// Elements that a gate and an up of [units, in] each take as panels of pairs.
int64_t muster_packed_pair_size(int64_t units, int64_t in) { return num_pair_panels(units) * kPanel * in; }

// Packs weight [out, in], whose rows are `stride` elements apart, into `packed`, both `stored` alike.
void muster_pack(int stored, const void* weight, int64_t stride, int64_t out, int64_t in, void* packed, int threads) {
  as_stored(stored, weight, [=](auto* from) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(from)>>*>(
        static_cast<decltype(from)>(packed));
    in_shares(num_panels(out), threads, [=](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel;
        pack_lanes(from + first * stride, stride, out - first, in, to + first * in, 0, kPanel);
      }
    });
  });
}

// Packs gate and up [units, in], whose rows are `stride` elements apart, into panels of pairs.
void muster_pack_pairs(int stored, const void* gate, const void* up, int64_t stride, int64_t units, int64_t in,
                       void* packed, int threads) {
  as_stored(stored, gate, [=](auto* gates) {
    auto* ups = static_cast<decltype(gates)>(up);
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(gates)>>*>(
        static_cast<decltype(gates)>(packed));
    in_shares(num_pair_panels(units), threads, [=](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kLanes;
        pack_lanes(gates + first * stride, stride, units - first, in, to + panel * kPanel * in, 0, kLanes);
        pack_lanes(ups + first * stride, stride, units - first, in, to + panel * kPanel * in, kLanes, kLanes);
      }
    });
  });
}

// y [rows, out] = the product of x, whose rows are `x_stride` floats apart, on top of `plus` [rows, out] where that is not
// null. `normed` [rows, in] is scratch where the product has a norm.
void muster_product(const Product* product, const float* x, int64_t x_stride, int64_t rows, const float* plus,
                    float* normed, float* y, int threads) {
  const Rows taken = prepare(*product, {x, x_stride}, rows, normed, product->in, threads);
  multiply_into(*product, taken, rows, plus, y, threads);
}

// y [rows, units] = the activation of x times the packed pairs.
void muster_gated_product(const Product* product, const Activation* by, const float* x, int64_t x_stride, int64_t rows,
                          float* normed, float* y, int threads) {
  const int64_t units = product->out;
  const float* bias = product->bias;
  const Rows taken = prepare(*product, {x, x_stride}, rows, normed, product->in, threads);
  in_shares(num_pair_panels(units), threads, [&](int64_t begin, int64_t end) {
    multiply(*product, taken, rows, begin, end, [&](int64_t row, int64_t panel, Vector gate, Vector up) {
      const int64_t unit = panel * kLanes, count = units - unit;
      if (bias != nullptr) {
        gate += load_part(bias + unit, count);
        up += load_part(bias + units + unit, count);
      }
      store_part(y + row * units + unit, activate(gate, up, *by), count);
    });
  });
}

}  // extern "C"
