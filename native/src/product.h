// A product with a fixed weight, and the norm before it where there is one.
#pragma once

#include "panels.h"
#include "rows.h"
#include "threads.h"

namespace muster {

// As Python fills it in. Of pairs `out` counts units. Where `norm` [in] is not null, rows are normed first.
struct Product {
  const void* packed;
  const float* bias;  // [out], of pairs [2][out]: gates and then ups; null for none
  const float* norm;
  int64_t out;
  int64_t in;
  float eps;
  int32_t stored;
};

// Rows that lie `stride` floats apart.
struct Rows {
  const float* first;
  int64_t stride;

  const float* operator()(int64_t row) const { return first + row * stride; }
};

// The rows as the product takes them. Normed ones are written to `normed`, `stride` floats apart.
inline Rows prepare(const Product& product, const Rows& x, int64_t rows, float* normed, int64_t stride, int threads) {
  if (product.norm == nullptr) return x;
  in_shares(rows, threads_for(rows * product.in, threads), [=, &product](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      normalise(x(row), product.norm, product.in, product.eps, normed + row * stride);
    }
  });
  return {normed, stride};
}

// See `multiply`, for the panels [first, last).
template <class Take>
void multiply(const Product& product, const Rows& x, int64_t rows, int64_t first, int64_t last, Take take) {
  as_stored(product.stored, product.packed, [&](auto* panels) {
    multiply(rows, x, panels, product.in, first, last, take);
  });
}

// y [rows, out] = x times the weight, with its bias, and on top of `plus` [rows, out] where that is not null.
inline void multiply_into(const Product& product, const Rows& x, int64_t rows, const float* plus, float* y, int threads) {
  in_shares(num_panels(product.out), threads, [&](int64_t begin, int64_t end) {
    multiply(product, x, rows, begin, end, [&](int64_t row, int64_t panel, Vector left, Vector right) {
      const int64_t output = panel * kPanel, count = product.out - output, at = row * product.out + output;
      if (product.bias != nullptr) {
        left += load_part(product.bias + output, count);
        right += load_part(product.bias + output + kLanes, count - kLanes);
      }
      if (plus != nullptr) {
        left += load_part(plus + at, count);
        right += load_part(plus + at + kLanes, count - kLanes);
      }
      store_part(y + at, left, count);
      store_part(y + at + kLanes, right, count - kLanes);
    });
  });
}

}  // namespace muster
