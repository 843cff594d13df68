// Rows by a fixed weight in panels: the loop under every product.
//
//   weight [out, in]      panels of kPanel outputs, each [in][kPanel]: read from begin to end, whatever the rows are
//
//        in                     k = 0       k = 1
//     +-------+               +-----------+-----------+--
//  out| p0    |   panel p0:   | o0 .. o31 | o0 .. o31 | ...        outputs behind the last one are zeros
//     +-------+               +-----------+-----------+--
//     | p1    |
//
// In a panel of pairs the left half are gates and the right half the ups of the same units, so that both sums of a unit
// are in registers together. A tile of rows meets one panel in registers. Every output is summed over k in order, from
// zero: what a row gives does not depend on the rows beside it, nor on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "stored.h"
#include "vectors.h"

namespace muster {

#ifdef __AVX512F__
constexpr int kTile = 12;  // 24 sums, two vectors of weights and a row's value in 32 registers
#else
constexpr int kTile = 6;  // 12 sums in 16
#endif
// Rows that go through all panels together: as many as stay in the second cache beside a panel.
constexpr int64_t kBlock = 8 * kTile;

struct Tile {
  const float* rows[kTile];
  Vector sums[kTile][2];
};

// How weights are asked for ahead of their use. Those that are used once go past the caches: a step reads all of a model's,
// and they would drive everything else out, the code of Python first, which then takes twice as long.
enum class Ahead { kNot, kOnce, kKept };

constexpr int64_t kAheadBytes = 4096;

template <Ahead kAhead, class Weight>
inline void ask_for(const Weight* weights) {
  const char* first = reinterpret_cast<const char*>(weights) + kAheadBytes;
  for (int64_t at = 0; at < static_cast<int64_t>(kPanel * sizeof(Weight)); at += 64) {
    if constexpr (kAhead == Ahead::kOnce) __builtin_prefetch(first + at, 0, 0);
    if constexpr (kAhead == Ahead::kKept) __builtin_prefetch(first + at, 0, 2);
  }
}

template <class Weight, int kRows, Ahead kAhead>
void meet(Tile& tile, const Weight* panel, int64_t in) {
  Vector sums[kRows][2] = {};
  const float* rows[kRows];
  for (int row = 0; row < kRows; ++row) rows[row] = tile.rows[row];
#pragma GCC unroll 2
  for (int64_t k = 0; k < in; ++k) {
    ask_for<kAhead>(panel + k * kPanel);
    const Pair weights = widen(panel + k * kPanel);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const float value = rows[row][k];
      sums[row][0] += value * weights.left;
      sums[row][1] += value * weights.right;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    tile.sums[row][0] = sums[row][0];
    tile.sums[row][1] = sums[row][1];
  }
}

template <class Weight>
using Meet = void (*)(Tile&, const Weight*, int64_t);

template <class Weight, Ahead kAhead, int... kCounts>
constexpr auto meets(std::integer_sequence<int, kCounts...>) {
  return std::array<Meet<Weight>, sizeof...(kCounts)>{meet<Weight, kCounts + 1, kAhead>...};
}

// Rows row_of(0) .. row_of(count - 1) by the panels [first, last) of `packed`; take(row, panel, left sums, right sums).
// Tiles of a block are as even as can be: a last one of a single row would read a panel for itself.
template <class Weight, class RowOf, class Take>
void multiply(int64_t count, RowOf row_of, const Weight* packed, int64_t in, int64_t first, int64_t last, Take take) {
  using Counts = std::make_integer_sequence<int, kTile>;
  static constexpr auto kOnce = meets<Weight, Ahead::kOnce>(Counts{}), kKept = meets<Weight, Ahead::kKept>(Counts{});
  static constexpr auto kAgain = meets<Weight, Ahead::kNot>(Counts{});
  Tile tile;
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t rows = std::min(kBlock, count - block), parts = (rows + kTile - 1) / kTile;
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = block + rows * part / parts, end = block + rows * (part + 1) / parts;
        for (int64_t row = begin; row < end; ++row) tile.rows[row - begin] = row_of(row);
        const auto& by_rows = part > 0 ? kAgain : (count <= kTile ? kOnce : kKept);
        by_rows[end - begin - 1](tile, packed + panel * in * kPanel, in);
        for (int64_t row = begin; row < end; ++row) {
          take(row, panel, tile.sums[row - begin][0], tile.sums[row - begin][1]);
        }
      }
    }
  }
}

inline int64_t num_panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

// Of panels of pairs, whose weight has `units` gates and as many ups.
inline int64_t num_pair_panels(int64_t units) { return (units + kLanes - 1) / kLanes; }

}  // namespace muster
