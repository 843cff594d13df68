// What is done to each row by itself: norms, rotations, and writing it to where it is kept.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sums.h"
#include "threads.h"
#include "vectors.h"

namespace muster {
namespace {

// Rows of less than this many floats in all are one thread's: to wake another takes longer.
constexpr int64_t kLeastPerThread = 1 << 15;

int threads_for(int64_t floats, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, floats / kLeastPerThread)));
}

void normalise(const float* x, const float* weight, int64_t width, float eps, float* y) {
  Vector squares{};
  for (int64_t at = 0; at < width; at += kLanes) {
    const Vector part = load_part(x + at, width - at);
    squares += part * part;
  }
  const Vector factor = splat(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps));
  for (int64_t at = 0; at < width; at += kLanes) {
    const int64_t left = width - at;
    store_part(y + at, load_part(x + at, left) * factor * load_part(weight + at, left), left);
  }
}

void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t width, float* y) {
  for (int64_t at = 0; at < half; at += kLanes) {
    const int64_t count = half - at;
    const Vector left = load_part(x + at, count), right = load_part(x + half + at, count);
    const Vector c = load_part(cos + at, count), s = load_part(sin + at, count);
    store_part(y + at, left * c - right * s, count);
    store_part(y + half + at, right * c + left * s, count);
  }
  if (x != y) std::copy(x + 2 * half, x + width, y + 2 * half);
}

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// y [rows, heads, width] = x over the root of its mean square, times weight [heads, width]: of each head of each row, the
// rows of x being `x_stride` floats apart.
void muster_norm(const float* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t width, const float* weight,
                 float eps, float* y, int threads) {
  in_shares(rows, threads_for(rows * heads * width, threads), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        normalise(x + row * x_stride + head * width, weight + head * width, width, eps, y + (row * heads + head) * width);
      }
    }
  });
}

// y [rows, heads, width] = x with its first 2 * half elements of each head rotated by cos and sin [rows, half]: element i
// pairs with element i + half. The rows of x are `x_stride` floats apart.
void muster_rotate(const float* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t width, const float* cos,
                   const float* sin, int64_t half, float* y, int threads) {
  in_shares(rows, threads_for(rows * heads * width, threads), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        rotate(x + row * x_stride + head * width, cos + row * half, sin + row * half, half, width,
               y + (row * heads + head) * width);
      }
    }
  });
}

// Writes rows x [rows, heads, width], whose rows are `x_stride` floats apart, to page pages[row], position offsets[row] of
// a plane; gives 1 where all were numbers, 0 where one was NaN or infinity.
int muster_write_rows(const float* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t width, float* plane,
                      int64_t page_stride, int64_t head_stride, int64_t position_stride, const int32_t* pages,
                      const int32_t* offsets) {
  Vector zeros{};  // NaN once there was NaN or infinity
  for (int64_t row = 0; row < rows; ++row) {
    float* to = plane + pages[row] * page_stride + offsets[row] * position_stride;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t at = 0; at < width; at += kLanes) {
        const Vector part = load_part(x + row * x_stride + head * width + at, width - at);
        zeros += part * splat(0.0f);
        store_part(to + head * head_stride + at, part, width - at);
      }
    }
  }
  return sum_of(zeros) == 0.0f;
}

}  // extern "C"
