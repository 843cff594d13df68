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

struct QueryRows {
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

// Asks for a row of `width` floats before it is read: rows of a page follow each other, but pages do not.
inline void ask_for(const float* row, int64_t width) {
  constexpr int64_t kLine = 16;
  for (int64_t at = 0; at < width; at += kLine) __builtin_prefetch(row + at);
}

// What some queries see of a block: its keys [begin, end). The first queries of an item ask for what is read next: values
// while keys are read, and keys of the `next` block, where there is one, while values are.
struct Part {
  const Block& block;
  int64_t begin;
  int64_t end;
  bool asks;
  const Block* next;
};

// Queries of one row and KV head that meet a block together, so that its keys and values are loaded once for them; and
// keys that they meet at once, or vectors of values: as many sums as there are registers.
constexpr int kQueries = 4;
constexpr int kTogether = kLanes == 16 ? 4 : 2;

// The state of one query: the largest score so far, and the sum and the output scaled by it.
struct State {
  float largest = kNothing;
  float sum = 0.0f;
};

// `kCount` queries, what they have seen, and their scores of a block, then their weights.
template <int kCount>
struct Queries {
  const float* q[kCount];
  State* states[kCount];
  float* outputs[kCount];
  alignas(kVectorBytes) float weights[kCount][kKeys];
};

// Products of all queries with kTogether keys, to sums[query][at] and following.
template <int kCount>
inline void meet(const Queries<kCount>& queries, const float* const* keys, int64_t width, Vector (*sums)[kLanes], int at) {
  Vector found[kCount][kTogether] = {};
  for (int64_t element = 0; element < width; element += kLanes) {
    const int64_t left = width - element;
    Vector parts[kTogether];
    for (int key = 0; key < kTogether; ++key) parts[key] = load_part(keys[key] + element, left);
    for (int query = 0; query < kCount; ++query) {
      const Vector part = load_part(queries.q[query] + element, left);
      for (int key = 0; key < kTogether; ++key) found[query][key] += part * parts[key];
    }
  }
  for (int query = 0; query < kCount; ++query) {
    for (int key = 0; key < kTogether; ++key) sums[query][at + key] = found[query][key];
  }
}

// Scores of the part's keys. Lanes of other keys have the score of one of them.
template <int kCount>
void score(Queries<kCount>& queries, const Part& part, const AttentionShape& shape) {
  for (int64_t first = part.begin / kLanes * kLanes; first < part.end; first += kLanes) {
    const float* keys[kLanes];
    Vector sums[kCount][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t key = std::clamp(first + lane, part.begin, part.end - 1);
      keys[lane] = part.block.keys[key];
      if (part.asks) ask_for(part.block.values[key], shape.value_width);
    }
    for (int at = 0; at < kLanes; at += kTogether) meet(queries, keys + at, shape.key_width, sums, at);
    for (int query = 0; query < kCount; ++query) {
      store(queries.weights[query] + first, sum_each(sums[query]) * splat(shape.scale));
    }
  }
}

// Scores to weights, and the share that the state keeps of its sum and output.
float weigh(float* weights, const Part& part, State& state) {
  const int64_t first = part.begin / kLanes * kLanes;
  Vector most = splat(state.largest);
  for (int64_t at = first; at < part.end; at += kLanes) {
    const Vector scores = load(weights + at);
    most = scores > most ? scores : most;
  }
  const float largest = largest_of(most);
  Vector sums{};
  for (int64_t at = first; at < part.end; at += kLanes) {
    store(weights + at, exp_of(load(weights + at) - splat(largest)));
    for (int64_t key = at; key < std::min(at + kLanes, part.begin); ++key) weights[key] = 0.0f;
    for (int64_t key = part.end; key < at + kLanes; ++key) weights[key] = 0.0f;
    sums += load(weights + at);
  }
  const float kept = state.largest == kNothing ? 0.0f : std::exp(state.largest - largest);
  state.sum = state.sum * kept + sum_of(sums);
  state.largest = largest;
  return kept;
}

// Adds the weighted values to kVectors vectors of the outputs from `element` on, of which `left` floats are left.
template <int kVectors, int kCount>
inline void add(const Queries<kCount>& queries, const float* kept, const Part& part, int64_t element, int64_t left,
                int64_t key_width) {
  Vector sums[kCount][kVectors];
  for (int query = 0; query < kCount; ++query) {
    for (int at = 0; at < kVectors; ++at) {
      const int64_t begin = at * kLanes;
      sums[query][at] = load_part(queries.outputs[query] + element + begin, left - begin) * splat(kept[query]);
    }
  }
  const int64_t asked = part.next != nullptr && element == 0 ? part.next->count : 0;
  for (int64_t key = part.begin; key < part.end; ++key) {
    if (key < asked) ask_for(part.next->keys[key], key_width);
    Vector values[kVectors];
    for (int at = 0; at < kVectors; ++at) {
      values[at] = load_part(part.block.values[key] + element + at * kLanes, left - at * kLanes);
    }
    for (int query = 0; query < kCount; ++query) {
      const Vector weight = splat(queries.weights[query][key]);
      for (int at = 0; at < kVectors; ++at) sums[query][at] += weight * values[at];
    }
  }
  for (int query = 0; query < kCount; ++query) {
    for (int at = 0; at < kVectors; ++at) {
      store_part(queries.outputs[query] + element + at * kLanes, sums[query][at], left - at * kLanes);
    }
  }
}

// Takes a part into the states and the outputs of the queries. What one gives does not depend on the others.
template <int kCount>
void attend(Queries<kCount>& queries, const Part& part, const AttentionShape& shape) {
  score(queries, part, shape);
  float kept[kCount];
  for (int query = 0; query < kCount; ++query) kept[query] = weigh(queries.weights[query], part, *queries.states[query]);
  constexpr int64_t kWidth = kTogether * kLanes;
  int64_t element = 0;
  // Whole vectors: how many floats are left is a constant, which asks nothing of each.
  for (; element + kWidth <= shape.value_width; element += kWidth) {
    add<kTogether>(queries, kept, part, element, kWidth, shape.key_width);
  }
  for (; element < shape.value_width; element += kLanes) {
    add<1>(queries, kept, part, element, shape.value_width - element, shape.key_width);
  }
}

// The queries [first, last), at most kCount, each of which fill(query, q, state, output) names.
template <int kCount = kQueries, class Fill>
void attend_together(int64_t first, int64_t last, Fill fill, const Part& part, const AttentionShape& shape) {
  if constexpr (kCount > 1) {
    if (last - first < kCount) return attend_together<kCount - 1>(first, last, fill, part, shape);
  }
  Queries<kCount> queries;
  for (int at = 0; at < kCount; ++at) fill(first + at, queries.q[at], queries.states[at], queries.outputs[at]);
  attend(queries, part, shape);
}

void attend_item(const Entry& entry, int64_t head, const AttentionShape& shape, const Plane& key, const Plane& value,
                 const QueryRows& q, float* output, float* lse) {
  const int64_t group = shape.num_heads / shape.num_kv_heads, width = shape.value_width;
  std::vector<State> states(entry.num_rows * group);
  const auto output_of = [&](int64_t row, int64_t at) {
    return output + ((entry.first_row + row) * shape.num_heads + head * group + at) * width;
  };
  for (int64_t row = 0; row < entry.num_rows; ++row) std::fill_n(output_of(row, 0), group * width, 0.0f);
  Block blocks[2];
  const int64_t begin = seen_by(entry, shape, 0).begin / kKeys * kKeys;
  find(blocks[0], begin, entry.kv_len, entry.pages, shape, key, value, head);
  for (int64_t at = 0; at < blocks[0].count; ++at) ask_for(blocks[0].keys[at], shape.key_width);
  for (int64_t first = begin, turn = 0; first < entry.kv_len; first += kKeys, turn ^= 1) {
    const Block& block = blocks[turn];
    Block* next = first + kKeys < entry.kv_len ? &blocks[turn ^ 1] : nullptr;
    if (next != nullptr) find(*next, first + kKeys, entry.kv_len, entry.pages, shape, key, value, head);
    bool asks = true;
    for (int64_t row = 0; row < entry.num_rows; ++row) {
      const Seen seen = seen_by(entry, shape, row);
      const int64_t from = std::max(seen.begin - first, int64_t{0}), to = std::min(seen.end - first, block.count);
      if (from >= to) continue;
      const auto fill = [&](int64_t at, const float*& query, State*& state, float*& out) {
        query = q.first + (entry.first_row + row) * q.row_stride + (head * group + at) * q.head_stride;
        state = &states[row * group + at];
        out = output_of(row, at);
      };
      for (int64_t at = 0; at < group; at += kQueries) {
        const Part part{block, from, to, asks, asks ? next : nullptr};
        attend_together(at, std::min(at + kQueries, group), fill, part, shape);
        asks = false;
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
  const QueryRows queries{q, q_row_stride, q_head_stride};
  in_turns(count * shape->num_kv_heads, threads, [&](int64_t item) {
    attend_item(entries[item / shape->num_kv_heads], item % shape->num_kv_heads, *shape, *key, *value, queries, output,
                lse);
  });
}

}  // extern "C"
