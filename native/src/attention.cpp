// Attention of a few rows of each sequence over its pages, where they lie: decode, and whatever else is short.
//
//   entry        rows of one sequence, and the pages that hold its keys in order of position
//   item         an entry and one KV head: its queries are (row, query head of that KV head)
//   block        kKeys positions, at multiples of kKeys: keys and values of a block are read into the first cache once
//                for all queries of the item, whatever the size of a page and its strides are
//
// Scores of kLanes keys are made together. The maximum moves from block to block, and what has been summed is scaled
// with it ("Online normalizer calculation for softmax", arXiv 1805.02867). A row's blocks, and the order inside them, do
// not depend on other rows, nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "exponential.h"
#include "sums.h"
#include "threads.h"
#include "vectors.h"

namespace muster {

// One entry: `num_rows` rows of q from `first_row` on; `kv_len` keys from the first of `pages` on. Where it is causal the
// last row sees all of them, each row before one less.
struct Entry {
  int64_t first_row;
  int64_t num_rows;
  int64_t kv_len;
  int64_t is_causal;
  const int32_t* pages;
};

// Where keys or values lie: strides in floats.
struct Plane {
  const float* first;
  int64_t page_stride;
  int64_t head_stride;
  int64_t position_stride;
};

struct AttentionShape {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t key_width;
  int64_t value_width;
  int64_t page_size;
  int64_t window;  // 0 for none
  float scale;
};

struct Queries {
  const float* first;
  int64_t row_stride;
  int64_t head_stride;
};

namespace {

constexpr int64_t kKeys = 64;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Seen {
  int64_t begin;
  int64_t end;
};

Seen seen_by(const Entry& entry, const AttentionShape& shape, int64_t row) {
  if (!entry.is_causal) return {0, entry.kv_len};
  const int64_t end = std::max<int64_t>(entry.kv_len - (entry.num_rows - 1 - row), 0);
  return {shape.window > 0 ? std::max<int64_t>(end - shape.window, 0) : 0, end};
}

struct Block {
  int64_t count;
  const float* keys[kKeys];
  const float* values[kKeys];
};

void find(Block& block, int64_t first, int64_t kv_len, const int32_t* pages, const AttentionShape& shape,
          const Plane& key, const Plane& value, int64_t head) {
  block.count = std::min(kKeys, kv_len - first);
  for (int64_t at = 0; at < block.count;) {
    const int64_t position = first + at, page = pages[position / shape.page_size], offset = position % shape.page_size;
    const int64_t run = std::min(shape.page_size - offset, block.count - at);
    const float* k = key.first + page * key.page_stride + head * key.head_stride + offset * key.position_stride;
    const float* v = value.first + page * value.page_stride + head * value.head_stride + offset * value.position_stride;
    for (int64_t step = 0; step < run; ++step, ++at) {
      block.keys[at] = k + step * key.position_stride;
      block.values[at] = v + step * value.position_stride;
    }
  }
}

// Products of q with kLanes keys.
inline Vector dots(const float* q, const float* const* keys, int64_t width) {
  Vector sums[kLanes] = {};
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    const Vector part = load(q + at);
#pragma GCC unroll 16
    for (int key = 0; key < kLanes; ++key) sums[key] += part * load(keys[key] + at);
  }
  if (at < width) {
    const Vector part = load_part(q + at, width - at);
    for (int key = 0; key < kLanes; ++key) sums[key] += part * load_part(keys[key] + at, width - at);
  }
  return sum_each(sums);
}

// The state of one query: the largest score so far, and the sum and the output scaled by it.
struct State {
  float largest = kNothing;
  float sum = 0.0f;
};

// Takes the keys [begin, end) of a block into the state and into output [width].
void attend(const float* q, const Block& block, int64_t begin, int64_t end, const AttentionShape& shape, State& state,
            float* output) {
  alignas(kVectorBytes) float weights[kKeys];
  const int64_t first = begin / kLanes * kLanes;
  float largest = state.largest;
  for (int64_t group = first; group < end; group += kLanes) {
    const float* keys[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) keys[lane] = block.keys[std::clamp(group + lane, begin, end - 1)];
    store(weights + group, dots(q, keys, shape.key_width) * splat(shape.scale));
  }
  for (int64_t at = begin; at < end; ++at) largest = weights[at] > largest ? weights[at] : largest;
  Vector sums{};
  for (int64_t group = first; group < end; group += kLanes) {
    store(weights + group, exp_of(load(weights + group) - splat(largest)));
    for (int64_t at = group; at < std::min(group + kLanes, begin); ++at) weights[at] = 0.0f;
    for (int64_t at = end; at < group + kLanes; ++at) weights[at] = 0.0f;
    sums += load(weights + group);
  }
  const float kept = state.largest == kNothing ? 0.0f : std::exp(state.largest - largest);
  state.sum = state.sum * kept + sum_of(sums);
  state.largest = largest;
  for (int64_t at = 0; at < shape.value_width; at += kLanes) {
    const int64_t left = shape.value_width - at;
    Vector sum = load_part(output + at, left) * splat(kept);
    if (left >= kLanes) {
      for (int64_t key = begin; key < end; ++key) sum += splat(weights[key]) * load(block.values[key] + at);
    } else {
      for (int64_t key = begin; key < end; ++key) sum += splat(weights[key]) * load_part(block.values[key] + at, left);
    }
    store_part(output + at, sum, left);
  }
}

void attend_item(const Entry& entry, int64_t head, const AttentionShape& shape, const Plane& key, const Plane& value,
                 const Queries& q, float* output, float* lse) {
  const int64_t group = shape.num_heads / shape.num_kv_heads, width = shape.value_width;
  std::vector<State> states(entry.num_rows * group);
  const auto output_of = [&](int64_t row, int64_t at) {
    return output + ((entry.first_row + row) * shape.num_heads + head * group + at) * width;
  };
  for (int64_t row = 0; row < entry.num_rows; ++row) std::fill_n(output_of(row, 0), group * width, 0.0f);
  Block block;
  const int64_t begin = seen_by(entry, shape, 0).begin / kKeys * kKeys;
  for (int64_t first = begin; first < entry.kv_len; first += kKeys) {
    find(block, first, entry.kv_len, entry.pages, shape, key, value, head);
    for (int64_t row = 0; row < entry.num_rows; ++row) {
      const Seen seen = seen_by(entry, shape, row);
      const int64_t from = std::max(seen.begin - first, int64_t{0}), to = std::min(seen.end - first, block.count);
      if (from >= to) continue;
      for (int64_t at = 0; at < group; ++at) {
        const float* query = q.first + (entry.first_row + row) * q.row_stride + (head * group + at) * q.head_stride;
        attend(query, block, from, to, shape, states[row * group + at], output_of(row, at));
      }
    }
  }
  for (int64_t row = 0; row < entry.num_rows; ++row) {
    for (int64_t at = 0; at < group; ++at) {
      const State& state = states[row * group + at];
      float* out = output_of(row, at);
      const float share = state.largest == kNothing && state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
      for (int64_t lane = 0; lane < width; ++lane) out[lane] *= share;
      if (lse != nullptr) {
        lse[(entry.first_row + row) * shape.num_heads + head * group + at] = state.largest + std::log(state.sum);
      }
    }
  }
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Writes the rows of the entries in output [rows, num_heads, value_width] and, where it is not null, in lse [rows,
// num_heads]: zeros and minus infinity for one that sees nothing. Values must be finite wherever they lie in a page.
void muster_attend(const Entry* entries, int64_t count, const AttentionShape* shape, const Plane* key,
                   const Plane* value, const float* q, int64_t q_row_stride, int64_t q_head_stride, float* output,
                   float* lse, int threads) {
  const Queries queries{q, q_row_stride, q_head_stride};
  in_turns(count * shape->num_kv_heads, threads, [&](int64_t item) {
    attend_item(entries[item / shape->num_kv_heads], item % shape->num_kv_heads, *shape, *key, *value, queries, output,
                lse);
  });
}

}  // extern "C"
