// The gate of a layer in one call: the norm of the rows, their logits, the experts that each chooses, and where those are.
//
// A row leaves as a message of floats that a collective carries and experts read:
//
//   | x, normed      | slots     | weights   |
//   | width floats   | k int32   | k floats  |        the slots of a row that only pads are -1

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "product.h"

namespace muster {

// As Python fills it in; see parallel/models/gates.py. `slots` [experts, most_copies] and `copies` [experts] say where each
// expert is: its rows take turns.
struct Gate {
  Product logits;
  const float* correction;  // [experts]; null for none
  const int32_t* slots;
  const int32_t* copies;
  int64_t most_copies;
  int64_t top_k;
  int64_t num_groups;
  int64_t kept_groups;
  int64_t group_best;  // by how many of its best experts a group is judged
  int32_t is_sigmoid;
  int32_t renormalises;
  float scale;
};

namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

// Logits to scores, in place.
void score(float* logits, int64_t count, bool is_sigmoid) {
  if (is_sigmoid) {
    for (int64_t at = 0; at < count; ++at) logits[at] = 1.0f / (1.0f + std::exp(-logits[at]));
    return;
  }
  float largest = kLeast, sum = 0.0f;
  for (int64_t at = 0; at < count; ++at) largest = logits[at] > largest ? logits[at] : largest;
  for (int64_t at = 0; at < count; ++at) sum += logits[at] = std::exp(logits[at] - largest);
  for (int64_t at = 0; at < count; ++at) logits[at] /= sum;
}

// Moves the places of the `best` largest values to the front, best first, of equal ones the first: a stable choice, and a
// legal one whatever is no number.
void choose(const float* values, int64_t count, int64_t best, std::vector<int32_t>& places) {
  places.resize(count);
  for (int64_t at = 0; at < count; ++at) places[at] = static_cast<int32_t>(at);
  for (int64_t taken = 0; taken < best; ++taken) {
    int64_t leader = taken;
    for (int64_t at = taken + 1; at < count; ++at) {
      const float value = values[places[at]], held = values[places[leader]];
      if (value > held || (value == held && places[at] < places[leader])) leader = at;
    }
    std::swap(places[taken], places[leader]);
  }
}

// One thread's memory.
struct Choice {
  std::vector<float> values;
  std::vector<float> groups;
  std::vector<int32_t> places;
};

// What experts are chosen by: minus infinity in all groups but the best.
void leave_groups(const Gate& gate, int64_t experts, Choice& choice) {
  const int64_t size = experts / gate.num_groups;
  choice.groups.assign(gate.num_groups, 0.0f);
  for (int64_t group = 0; group < gate.num_groups; ++group) {
    const float* values = choice.values.data() + group * size;
    choose(values, size, gate.group_best, choice.places);
    for (int64_t at = 0; at < gate.group_best; ++at) choice.groups[group] += values[choice.places[at]];
  }
  choose(choice.groups.data(), gate.num_groups, gate.kept_groups, choice.places);
  for (int64_t at = gate.kept_groups; at < gate.num_groups; ++at) {
    std::fill_n(choice.values.begin() + choice.places[at] * size, size, kLeast);
  }
}

// The slots and the weights of one row, the `number`-th of the block, from its logits.
void route(const Gate& gate, float* logits, int64_t number, Choice& choice, int32_t* slots, float* weights) {
  const int64_t experts = gate.logits.out;
  score(logits, experts, gate.is_sigmoid);
  choice.values.assign(logits, logits + experts);
  if (gate.correction != nullptr) {
    for (int64_t at = 0; at < experts; ++at) choice.values[at] += gate.correction[at];
  }
  if (gate.kept_groups < gate.num_groups) leave_groups(gate, experts, choice);
  choose(choice.values.data(), experts, gate.top_k, choice.places);
  float sum = 0.0f;
  for (int64_t at = 0; at < gate.top_k; ++at) sum += logits[choice.places[at]];
  for (int64_t at = 0; at < gate.top_k; ++at) {
    const int64_t expert = choice.places[at];
    slots[at] = gate.slots[expert * gate.most_copies + number % gate.copies[expert]];
    // Sigmoids may all be next to nothing; a softmax's best are never so small that this changes them.
    weights[at] = (gate.renormalises ? logits[expert] / (sum + 1e-20f) : logits[expert]) * gate.scale;
  }
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Of x, whose rows are `x_stride` floats apart, the messages [padded_rows, width + 2 * top_k]; the rows are `first_row` and
// following of the block, and those behind the first `rows` only pad.
void muster_gate(const Gate* gate, const float* x, int64_t x_stride, int64_t rows, int64_t first_row, int64_t padded_rows,
                 float* messages, int threads) {
  const int64_t width = gate->logits.in, experts = gate->logits.out, k = gate->top_k, stride = width + 2 * k;
  const Rows normed = prepare(gate->logits, {x, x_stride}, rows, messages, stride, threads);
  std::vector<float> logits(rows * experts);
  multiply_into(gate->logits, normed, rows, nullptr, logits.data(), threads);
  in_shares(rows, threads_for(rows * experts, threads), [&](int64_t begin, int64_t end) {
    Choice choice;
    for (int64_t row = begin; row < end; ++row) {
      float* message = messages + row * stride;
      if (normed.first != messages) std::copy_n(normed(row), width, message);
      route(*gate, logits.data() + row * experts, first_row + row, choice, reinterpret_cast<int32_t*>(message + width),
            message + width + k);
    }
  });
  for (int64_t row = rows; row < padded_rows; ++row) {
    std::fill_n(reinterpret_cast<int32_t*>(messages + row * stride + width), k, -1);
  }
}

}  // extern "C"
