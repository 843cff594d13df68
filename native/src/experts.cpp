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

// Those of a layer on this rank, from slot `first` on. A row comes as the gate's message: see gate.cpp.
struct Experts {
  const Expert* each;
  int64_t first;
  int64_t count;
  int64_t width;
  int64_t units;
  int64_t choices;
  Activation by;
  int32_t stored;
};

namespace {

struct Visits {
  std::vector<int64_t> order;   // row * choices + choice
  std::vector<int64_t> starts;  // of each expert in `order`, and their number
};

// Calls visit(expert, row * choices + choice) for all choices of a slot that is here, in order of rows.
template <class Visit>
void visit_slots(const Experts& experts, const float* messages, int64_t stride, int64_t rows, Visit visit) {
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* slots = reinterpret_cast<const int32_t*>(messages + row * stride + experts.width);
    for (int64_t choice = 0; choice < experts.choices; ++choice) {
      const int64_t local = slots[choice] - experts.first;
      if (local >= 0 && local < experts.count) visit(local, row * experts.choices + choice);
    }
  }
}

Visits by_expert(const Experts& experts, const float* messages, int64_t stride, int64_t rows) {
  Visits visits;
  visits.starts.assign(experts.count + 1, 0);
  visit_slots(experts, messages, stride, rows, [&](int64_t expert, int64_t) { ++visits.starts[expert + 1]; });
  for (int64_t expert = 0; expert < experts.count; ++expert) visits.starts[expert + 1] += visits.starts[expert];
  visits.order.resize(visits.starts[experts.count]);
  std::vector<int64_t> next(visits.starts.begin(), visits.starts.end() - 1);
  visit_slots(experts, messages, stride, rows, [&](int64_t expert, int64_t at) { visits.order[next[expert]++] = at; });
  return visits;
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// out [rows, width] = of each of the messages, which are `stride` floats apart, the weighted sum over its choices here, zeros
// where it has none; on top of `plus` [rows, width] where that is not null. `hidden` [rows * choices, units] is scratch.
void muster_experts(const Experts* of, const float* messages, int64_t stride, int64_t rows, const float* plus,
                    float* hidden, float* out, int threads) {
  const int64_t width = of->width, units = of->units, choices = of->choices;
  const Visits visits = by_expert(*of, messages, stride, rows);
  // Each thread has its panels of every expert: which experts have rows makes none of them idle.
  in_shares(num_pair_panels(units), threads, [&](int64_t begin, int64_t end) {
    for (int64_t expert = 0; expert < of->count; ++expert) {
      const int64_t start = visits.starts[expert], number = visits.starts[expert + 1] - start;
      const float* bias = of->each[expert].gated_bias;
      const auto take = [&](int64_t visit, int64_t panel, Vector gate, Vector up) {
        const int64_t unit = panel * kLanes, left = units - unit;
        if (bias != nullptr) {
          gate += load_part(bias + unit, left);
          up += load_part(bias + units + unit, left);
        }
        store_part(hidden + (start + visit) * units + unit, activate(gate, up, of->by), left);
      };
      as_stored(of->stored, of->each[expert].gated, [&](auto* panels) {
        const auto row_of = [&](int64_t visit) { return messages + visits.order[start + visit] / choices * stride; };
        multiply(number, row_of, panels, width, begin, end, take);
      });
    }
  });
  in_shares(num_panels(width), threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kPanel, to = std::min(end * kPanel, width);
    for (int64_t row = 0; row < rows; ++row) std::fill(out + row * width + from, out + row * width + to, 0.0f);
    for (int64_t expert = 0; expert < of->count; ++expert) {
      const int64_t start = visits.starts[expert], number = visits.starts[expert + 1] - start;
      const float* bias = of->each[expert].down_bias;
      const auto take = [&](int64_t visit, int64_t panel, Vector left, Vector right) {
        const int64_t at = visits.order[start + visit], row = at / choices, output = panel * kPanel, count = width - output;
        float* sum = out + row * width + output;
        const Vector weight = splat(messages[row * stride + width + choices + at % choices]);
        if (bias != nullptr) {
          left += load_part(bias + output, count);
          right += load_part(bias + output + kLanes, count - kLanes);
        }
        store_part(sum, load_part(sum, count) + weight * left, count);
        store_part(sum + kLanes, load_part(sum + kLanes, count - kLanes) + weight * right, count - kLanes);
      };
      as_stored(of->stored, of->each[expert].down, [&](auto* panels) {
        const auto row_of = [&](int64_t visit) { return hidden + (start + visit) * units; };
        multiply(number, row_of, panels, units, begin, end, take);
      });
    }
    for (int64_t row = 0; plus != nullptr && row < rows; ++row) {
      for (int64_t at = row * width + from; at < row * width + to; ++at) out[at] += plus[at];
    }
  });
}

}  // extern "C"
