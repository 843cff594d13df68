// All experts of a layer on a rank in one call.
//
//   rows       r0  r1  r2  r3            slots of each row: [r0: 5 2] [r1: 2 9] ...
//   by expert  slot 2: r0 r1   slot 5: r0 r3   ...         visits: (row, choice), in order of rows
//   hidden     a row of units for each visit               first all gated products, then all down products
//   output     out[row] += weight * down, expert by expert in order of slots: a sum's order is the same everywhere

#include <vector>

#include "activation.h"
#include "panels.h"
#include "threads.h"

namespace muster {

// One expert's packed weights, as Python fills them in: pointers that may be null are biases.
struct Expert {
  const void* gated;
  const float* gated_bias;
  const void* down;
  const float* down_bias;
};

namespace {

struct Visits {
  std::vector<int64_t> order;   // row * choices + choice
  std::vector<int64_t> starts;  // of each expert in `order`, and their number
};

Visits by_expert(const int64_t* slots, int64_t rows, int64_t choices, int64_t first, int64_t count) {
  Visits visits;
  visits.starts.assign(count + 1, 0);
  for (int64_t at = 0; at < rows * choices; ++at) {
    const int64_t local = slots[at] - first;
    if (local >= 0 && local < count) ++visits.starts[local + 1];
  }
  for (int64_t expert = 0; expert < count; ++expert) visits.starts[expert + 1] += visits.starts[expert];
  visits.order.resize(visits.starts[count]);
  std::vector<int64_t> next(visits.starts.begin(), visits.starts.end() - 1);
  for (int64_t at = 0; at < rows * choices; ++at) {
    const int64_t local = slots[at] - first;
    if (local >= 0 && local < count) visits.order[next[local]++] = at;
  }
  return visits;
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// out [rows, width] = of each row the weighted sum over its choices among the `count` experts from slot `first` on; zeros
// where it has none. x [rows, width], slots and weights [rows, choices] are contiguous, as is hidden [rows * choices,
// units], which is scratch.
void muster_experts(const Expert* experts, int64_t first, int64_t count, int stored, const float* x, int64_t rows,
                    int64_t width, const int64_t* slots, const float* weights, int64_t choices, int64_t units, float alpha,
                    float up_offset, float limit, float* hidden, float* out, int threads) {
  const Activation by{alpha, up_offset, limit};
  const Visits visits = by_expert(slots, rows, choices, first, count);
  // Each thread has its panels of every expert: which experts have rows makes none of them idle.
  in_shares(num_pair_panels(units), threads, [&](int64_t begin, int64_t end) {
    for (int64_t expert = 0; expert < count; ++expert) {
      const int64_t start = visits.starts[expert], number = visits.starts[expert + 1] - start;
      const float* bias = experts[expert].gated_bias;
      const auto take = [&](int64_t visit, int64_t panel, Vector gate, Vector up) {
        const int64_t unit = panel * kLanes, left = units - unit;
        if (bias != nullptr) {
          gate += load_part(bias + unit, left);
          up += load_part(bias + units + unit, left);
        }
        store_part(hidden + (start + visit) * units + unit, activate(gate, up, by), left);
      };
      as_stored(stored, experts[expert].gated, [&](auto* panels) {
        const auto row_of = [&](int64_t visit) { return x + visits.order[start + visit] / choices * width; };
        multiply(number, row_of, panels, width, begin, end, take);
      });
    }
  });
  in_shares(num_panels(width), threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kPanel, to = std::min(end * kPanel, width);
    for (int64_t row = 0; row < rows; ++row) std::fill(out + row * width + from, out + row * width + to, 0.0f);
    for (int64_t expert = 0; expert < count; ++expert) {
      const int64_t start = visits.starts[expert], number = visits.starts[expert + 1] - start;
      const float* bias = experts[expert].down_bias;
      const auto take = [&](int64_t visit, int64_t panel, Vector left, Vector right) {
        const int64_t at = visits.order[start + visit], output = panel * kPanel, count = width - output;
        float* sum = out + at / choices * width + output;
        const Vector weight = splat(weights[at]);
        if (bias != nullptr) {
          left += load_part(bias + output, count);
          right += load_part(bias + output + kLanes, count - kLanes);
        }
        store_part(sum, load_part(sum, count) + weight * left, count);
        store_part(sum + kLanes, load_part(sum + kLanes, count - kLanes) + weight * right, count - kLanes);
      };
      as_stored(stored, experts[expert].down, [&](auto* panels) {
        const auto row_of = [&](int64_t visit) { return hidden + (start + visit) * units; };
        multiply(number, row_of, panels, units, begin, end, take);
      });
    }
  });
}

}  // extern "C"
