// Draws one token from each row of logits. Nothing is sorted, and no filtered row is written.
//
//   maxima       the largest score of each kBlock tokens: a block that lies below what is looked for is passed over
//   order        tokens best first, those of equal score by id; what a filter keeps is all that is ahead of a Place in it
//   top-k        the k-th largest by halving the range of floats it lies in: each step counts what is as large
//   noise        a token wins if score + noise is largest. Noise beats d only if 1 - u < e^-d, for u > exp(-e^-d) is asked
//                and exp(-z) >= 1 - z: one product and one comparison rule out all but a few tokens
//   top-p        the winner of all is the winner of the kept ones if it is kept, and it is if the probability ahead of it
//                is short of top_p. Else nobody behind it is kept either, and the rest draw again: 1 - ln(top_p) times
//
// A row is one thread's, and what it gives depends on no other row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "exponential.h"
#include "noise.h"
#include "sums.h"
#include "threads.h"
#include "vectors.h"

namespace muster {

// How a row is drawn; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off.
struct Draw {
  float temperature;
  float top_p;
  float min_p;
  int32_t top_k;
  uint64_t seed;
  int64_t position;
};

namespace {

constexpr int64_t kBlock = 128;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where a token stands, or would, in the order.
struct Place {
  float score;
  int64_t token;
};

// Of tokens from `first` on: all bits of a lane whose token is ahead of the place.
inline IntVector are_ahead(Vector scores, int64_t first, const Place& place) {
  IntVector tokens{};
  for (int lane = 0; lane < kLanes; ++lane) tokens[lane] = lane;
  tokens += static_cast<int32_t>(first);
  return (scores > splat(place.score)) | ((scores == splat(place.score)) & (tokens < static_cast<int32_t>(place.token)));
}

inline Vector where(IntVector mask, Vector value) { return mask ? value : Vector{}; }

// e^x or up to 6.2 % more, 0 where x is less than -87: the bits of a float, read as a number, are a bent logarithm of it
// ("A Fast, Compact Approximation of the Exponential Function", Neural Computation 11, 1999).
inline Vector exp_above(Vector x) {
  constexpr float kOctave = 1 << 23;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vector bits = x * splat(kOctave * 1.44269504f) + splat(127.0f * kOctave);
  return as_floats(__builtin_convertvector(bits > splat(kOctave) ? bits : Vector{}, IntVector));
}

// One row of logits over its temperature: its scores.
struct Row {
  const float* logits;
  int64_t size;
  float temperature;
  std::vector<float> maxima;  // of the scores of each block
  bool is_finite;
  Place best;  // the first in the order

  float score(int64_t token) const { return logits[token] / temperature; }

  // From `first` on; behind the last one is minus infinity.
  Vector scores(int64_t first) const {
    return load_part(logits + first, size - first, -kInfinity) / splat(temperature);
  }
};

// Calls visit(begin, end) for each block that has a score of `least` or more.
template <class Visit>
void visit_blocks(const Row& row, float least, Visit visit) {
  for (int64_t block = 0, begin = 0; begin < row.size; ++block, begin += kBlock) {
    if (row.maxima[block] >= least) visit(begin, std::min(begin + kBlock, row.size));
  }
}

// Sets the maxima and whether all logits are numbers.
void survey(Row& row) {
  row.maxima.resize((row.size + kBlock - 1) / kBlock);
  Vector zeros{};  // NaN once there was NaN or infinity
  for (int64_t block = 0, begin = 0; begin < row.size; ++block, begin += kBlock) {
    Vector largest = splat(row.logits[begin]);
    for (int64_t at = begin, end = std::min(begin + kBlock, row.size); at < end; at += kLanes) {
      const Vector value = load_part(row.logits + at, row.size - at, row.logits[begin]);
      zeros += value * splat(0.0f);
      largest = value > largest ? value : largest;
    }
    row.maxima[block] = largest_of(largest) / row.temperature;
  }
  row.is_finite = sum_of(zeros) == 0.0f;
}

Place best_of(const Row& row) {
  const float largest = *std::max_element(row.maxima.begin(), row.maxima.end());
  int64_t block = 0, token = 0;
  while (row.maxima[block] < largest) ++block;
  for (token = block * kBlock; row.score(token) < largest;) ++token;
  return {largest, token};
}

Row row_of(const float* logits, int64_t size, const Draw& draw) {
  Row row{logits, size, draw.temperature > 0.0f ? draw.temperature : 1.0f, {}, false, {0.0f, 0}};
  survey(row);
  if (row.is_finite) row.best = best_of(row);
  return row;
}

// A float by its place among all floats, and back.
int32_t rank_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

float of_rank(int64_t rank) {
  const int32_t whole = static_cast<int32_t>(rank), bits = whole < 0 ? whole ^ 0x7FFFFFFF : whole;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

int64_t count_from(const Row& row, float least) {
  IntVector counts{};
  visit_blocks(row, least, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kLanes) counts -= row.scores(at) >= splat(least);
  });
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
  return count;
}

// At most the k-th largest score: the k-th largest of the maxima, each of which is a score.
float bound_of_kth(const Row& row, int64_t k) {
  if (static_cast<int64_t>(row.maxima.size()) < k) return -std::numeric_limits<float>::max();
  std::vector<float> maxima = row.maxima;
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
  return maxima[k - 1];
}

// The k-th largest score.
float kth_largest(const Row& row, int64_t k) {
  int64_t low = rank_of(bound_of_kth(row, k)), high = int64_t{rank_of(row.best.score)} + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (count_from(row, of_rank(middle)) >= k ? low : high) = middle;
  }
  return of_rank(low);
}

// What top-k keeps is ahead of it.
Place end_of_top_k(const Row& row, const Draw& draw) {
  const bool is_limited = draw.top_k > 0 && draw.top_k < row.size;
  return {is_limited ? kth_largest(row, draw.top_k) : -kInfinity, row.size};
}

// The same of min-p, which is relative to the best.
Place end_of_min_p(const Row& row, const Draw& draw) {
  if (!(draw.min_p > 0.0f)) return {-kInfinity, row.size};
  return {row.best.score + std::min(static_cast<float>(std::log(static_cast<double>(draw.min_p))), 0.0f), row.size};
}

// Whether the probability ahead of `place`, of all that is ahead of `end`, is short of `top_p`.
bool is_within(const Row& row, const Place& place, const Place& end, float top_p) {
  double ahead = 0.0, total = 0.0;
  visit_blocks(row, end.score, [&](int64_t first, int64_t last) {
    Vector sum{}, sum_ahead{};
    for (int64_t at = first; at < last; at += kLanes) {
      const Vector scores = row.scores(at);
      const Vector weights = where(are_ahead(scores, at, end), exp_of(scores - splat(row.best.score)));
      sum += weights;
      sum_ahead += where(are_ahead(scores, at, place), weights);
    }
    total += sum_of(sum);
    ahead += sum_of(sum_ahead);
  });
  return ahead == 0.0 || ahead < static_cast<double>(top_p) * total;
}

// The token with the largest score + noise of those ahead of `end`; of equal ones the first.
class Contest {
 public:
  Contest(const Row& row, uint64_t key) : row_(row), key_(key) { lead(row.best.token, result_of(row.best.token)); }

  int64_t winner(const Place& end) {
    visit_blocks(row_, end.score, [&](int64_t first, int64_t last) {
      alignas(kVectorBytes) int32_t can_win[kBlock];
      IntVector any{};
      for (int64_t at = first; at < last; at += kLanes) {
        const Vector scores = row_.scores(at);
        const IntVector can = (noise_rests(key_, at) < exp_above(scores - splat(bar_))) & are_ahead(scores, at, end);
        std::memcpy(can_win + (at - first), &can, sizeof(can));
        any |= can;
      }
      if (is_any(any)) meet(first, last, can_win);
    });
    return leader_;
  }

 private:
  static bool is_any(IntVector mask) {
    int64_t words[kVectorBytes / 8], any = 0;
    std::memcpy(words, &mask, sizeof(mask));
    for (const int64_t word : words) any |= word;
    return any != 0;
  }

  float result_of(int64_t token) const { return row_.score(token) + noise(key_, token); }

  void meet(int64_t first, int64_t last, const int32_t* can_win) {
    for (int64_t token = first; token < last; ++token) {
      if (can_win[token - first] == 0) continue;
      const float result = result_of(token);
      if (result > result_ || (result == result_ && token < leader_)) lead(token, result);
    }
  }

  void lead(int64_t token, float result) {
    leader_ = token;
    result_ = result;
    // Less by what score + noise and the exponential may be rounded.
    bar_ = result - (1e-4f + 1e-6f * std::fabs(result));
  }

  const Row& row_;
  uint64_t key_;
  int64_t leader_ = 0;
  float result_ = 0.0f;
  float bar_ = 0.0f;  // what a result must reach
};

int64_t token_of(const Row& row, const Draw& draw) {
  if (!(draw.temperature > 0.0f) || std::isinf(row.best.score)) return row.best.token;
  const uint64_t key = noise_key(draw.seed, draw.position);
  const Place kept = end_of_top_k(row, draw), by_min_p = end_of_min_p(row, draw);
  for (Place end = by_min_p.score > kept.score ? by_min_p : kept;;) {
    const int64_t token = Contest(row, key).winner(end);
    const Place place{row.score(token), token};
    if (draw.top_p >= 1.0f || is_within(row, place, kept, draw.top_p)) return token;
    end = place;
  }
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Of each of `rows` rows of logits [size], one or more, `stride` floats apart: whether it holds neither NaN nor infinity,
// and its token, 0 where it does.
void muster_draw(const float* logits, int64_t stride, int64_t rows, int64_t size, const Draw* draws, int64_t* tokens,
                 uint8_t* is_finite, int threads) {
  in_turns(rows, threads, [=](int64_t at) {
    const Row row = row_of(logits + at * stride, size, draws[at]);
    is_finite[at] = row.is_finite;
    tokens[at] = row.is_finite ? token_of(row, draws[at]) : 0;
  });
}

}  // extern "C"
