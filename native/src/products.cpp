// Products of rows with a fixed weight that is packed once.
//
//   weight [out, in]      panels of kPanel outputs, each [in][kPanel]: read from begin to end, whatever the rows are
//
//        in                     k = 0       k = 1
//     +-------+               +-----------+-----------+--
//  out| p0    |   panel p0:   | o0 .. o31 | o0 .. o31 | ...        outputs behind the last one are zeros
//     +-------+               +-----------+-----------+--
//     | p1    |
//
// A tile of rows meets one panel in registers. Every output is summed over k in order, from zero: what a row gives does
// not depend on the rows beside it, nor on the number of threads.

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "threads.h"
#include "vectors.h"

namespace muster {
namespace {

constexpr int kPanel = 2 * kLanes;
#ifdef __AVX512F__
constexpr int kTile = 12;  // 24 sums, two vectors of weights and a row's value in 32 registers
#else
constexpr int kTile = 6;  // 12 sums in 16
#endif
// Rows that go through all panels together: as many as stay in the second cache beside a panel.
constexpr int64_t kBlock = 8 * kTile;

struct Rows {
  const float* first;
  int64_t stride;
};

struct Outputs {
  float* first;
  int64_t stride;
  const float* bias;
  int64_t count;
};

template <int kRows>
void tile(const Rows& x, const float* panel, int64_t in, const Outputs& y, int64_t output) {
  Vector sums[kRows][2] = {};
  const float* rows[kRows];
  for (int row = 0; row < kRows; ++row) rows[row] = x.first + row * x.stride;
#pragma GCC unroll 2
  for (int64_t k = 0; k < in; ++k) {
    const Vector left = load(panel + k * kPanel), right = load(panel + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const float value = rows[row][k];
      sums[row][0] += value * left;
      sums[row][1] += value * right;
    }
  }
  const int64_t left = y.count - output;
  for (int half = 0; half < 2; ++half) {
    const int64_t at = output + half * kLanes, count = left - half * kLanes;
    const Vector bias = y.bias == nullptr ? Vector{} : load_part(y.bias + at, count);
    for (int row = 0; row < kRows; ++row) store_part(y.first + row * y.stride + at, sums[row][half] + bias, count);
  }
}

using Tile = void (*)(const Rows&, const float*, int64_t, const Outputs&, int64_t);

template <int... kCounts>
constexpr auto tiles(std::integer_sequence<int, kCounts...>) {
  return std::array<Tile, sizeof...(kCounts)>{tile<kCounts + 1>...};
}

constexpr auto kTiles = tiles(std::make_integer_sequence<int, kTile>{});

// Rows [0, count) by the panels [first, last). Tiles of a block are as even as can be: a last one of a single row would
// read a panel for itself.
void product(Rows x, int64_t count, const float* panels, int64_t in, Outputs y, int64_t first, int64_t last) {
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t rows = std::min(kBlock, count - block), parts = (rows + kTile - 1) / kTile;
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = block + rows * part / parts, end = block + rows * (part + 1) / parts;
        const Rows tile_rows{x.first + begin * x.stride, x.stride};
        const Outputs tile_outputs{y.first + begin * y.stride, y.stride, y.bias, y.count};
        kTiles[end - begin - 1](tile_rows, panels + panel * in * kPanel, in, tile_outputs, panel * kPanel);
      }
    }
  }
}

int64_t num_panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Floats of a vector.
int muster_lanes() { return kLanes; }

// Floats that a weight [out, in] takes when it is packed.
int64_t muster_packed_floats(int64_t out, int64_t in) { return num_panels(out) * kPanel * in; }

// Packs weight [out, in], whose rows are `stride` floats apart, into `packed`.
void muster_pack(const float* weight, int64_t stride, int64_t out, int64_t in, float* packed, int threads) {
  in_shares(num_panels(out), threads, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t k = 0; k < in; ++k) {
        float* to = packed + (panel * in + k) * kPanel;
        for (int64_t lane = 0; lane < kPanel; ++lane) {
          const int64_t output = panel * kPanel + lane;
          to[lane] = output < out ? weight[output * stride + k] : 0.0f;
        }
      }
    }
  });
}

// y [rows, out] = x [rows, in] times the packed weight, and bias [out] where it is not null. Strides are in floats.
void muster_product(const float* x, int64_t x_stride, int64_t rows, const float* packed, const float* bias, int64_t out,
                    int64_t in, float* y, int64_t y_stride, int threads) {
  in_shares(num_panels(out), threads, [=](int64_t begin, int64_t end) {
    product(Rows{x, x_stride}, rows, packed, in, Outputs{y, y_stride, bias, out}, begin, end);
  });
}

}  // extern "C"
