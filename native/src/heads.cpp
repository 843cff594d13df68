// The heads of attention in one call: the norm of the rows, their product with q, k and v, the norms of q's and k's heads,
// and their rotation.

#include "product.h"

namespace muster {

// As Python fills it in: `heads` of `width`, of which the first `rotated` are q's and k's.
struct Heads {
  Product product;
  const float* norms;  // [rotated, width]; null for none
  int64_t heads;
  int64_t rotated;
  int64_t width;
  float eps;
};

}  // namespace muster

using namespace muster;

extern "C" {

// y [rows, heads, width] of x, whose rows are `x_stride` floats apart; cos and sin [rows, half] rotate the first 2 * half
// elements of a head. `normed` [rows, in] is scratch where the product has a norm.
void muster_heads(const Heads* of, const float* x, int64_t x_stride, int64_t rows, const float* cos, const float* sin,
                  int64_t half, float* normed, float* y, int threads) {
  const Rows taken = prepare(of->product, {x, x_stride}, rows, normed, of->product.in, threads);
  multiply_into(of->product, taken, rows, nullptr, y, threads);
  in_shares(rows, threads_for(rows * of->rotated * of->width, threads), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < of->rotated; ++head) {
        float* at = y + (row * of->heads + head) * of->width;
        if (of->norms != nullptr) normalise(at, of->norms + head * of->width, of->width, of->eps, at);
        rotate(at, cos + row * half, sin + row * half, half, of->width, at);
      }
    }
  });
}

}  // extern "C"
