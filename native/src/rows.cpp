// What is done to each row by itself: a norm, and writing it to where it is kept.

#include "rows.h"

using namespace muster;

extern "C" {

// y [rows, width] = x over the root of its mean square, times weight: the rows of x are `x_stride` floats apart.
void muster_norm(const float* x, int64_t x_stride, int64_t rows, int64_t width, const float* weight, float eps, float* y,
                 int threads) {
  in_shares(rows, threads_for(rows * width, threads), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      normalise(x + row * x_stride, weight, width, eps, y + row * width);
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
