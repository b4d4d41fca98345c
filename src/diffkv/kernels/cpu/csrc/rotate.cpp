// rotate: signs and Hadamard transforms of blocks of channels, of vectors and back. As a sequence
// of sums and differences, head_dim log(head_dim) of them; a product with the matrix has
// head_dim^2.

#include <algorithm>
#include <vector>

#include "element.h"

namespace {

constexpr int MAX_DIM = 1024;  // rotate.py refuses more

// One butterfly inside a vector: lane i meets lane i ^ HALF.
template <int HALF>
INLINE Floats butterfly(Floats x) {
  const Ints lanes = iota();
  const Floats other = __builtin_shuffle(x, lanes ^ HALF);
  return (lanes & HALF) == 0 ? other + x : other - x;
}

// Transforms `num` vectors of channels in place, in blocks of `size` channels.
INLINE void transform(Floats* x, int num, int size) {
  for (int i = 0; i < num; i++)
    each<4>([&](auto log_half) {
      constexpr int HALF = 1 << log_half.value;
      if constexpr (HALF < LANES)
        if (HALF < size) x[i] = butterfly<HALF>(x[i]);
    });
  for (int half = 1; half * LANES < size; half *= 2)
    for (int start = 0; start < num; start += 2 * half)
      for (int i = start; i < start + half; i++) {
        const Floats a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

template <int DTYPE>
void rotate_rows(const uint8_t* x, int64_t num_rows, int64_t row_bytes, int heads, int dim,
                 int size, const float* signs, bool inverse, uint8_t* out, int64_t out_row_bytes,
                 int threads) {
  const int num = (dim + LANES - 1) / LANES;
  const int64_t total = num_rows * heads;
  const float norm = 1 / std::sqrt((float)size);
  std::vector<float> scales(num * LANES);
  for (int i = 0; i < dim; i++) scales[i] = signs[i] * norm;
#pragma omp parallel for schedule(static) num_threads(threads) if (total >= 128)
  for (int64_t i = 0; i < total; i++) {
    Floats row[MAX_DIM / LANES];
    const int64_t head_bytes = (i % heads) * dim * dtype_bytes(DTYPE);
    const uint8_t* from = x + i / heads * row_bytes + head_bytes;
    uint8_t* to = out + i / heads * out_row_bytes + head_bytes;
    for (int c = 0; c < num; c++) {
      const int count = std::min(LANES, dim - c * LANES);
      row[c] = load_elements<DTYPE>(from + c * LANES * dtype_bytes(DTYPE), count);
      if (!inverse) row[c] *= load<Floats>(&scales[c * LANES]);
    }
    transform(row, num, size);
    for (int c = 0; c < num; c++) {
      const int count = std::min(LANES, dim - c * LANES);
      if (inverse) row[c] *= load<Floats>(&scales[c * LANES]);
      store_elements<DTYPE>(to + c * LANES * dtype_bytes(DTYPE), row[c], count);
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void diffkv_rotate(
    const uint8_t* x, int64_t num_rows, int64_t row_bytes, int heads, int dim, int size, int dtype,
    const float* signs, int inverse, uint8_t* out, int64_t out_row_bytes, int threads) {
  each<3>([&](auto DTYPE) {
    if (dtype == DTYPE.value)
      rotate_rows<DTYPE.value>(x, num_rows, row_bytes, heads, dim, size, signs, inverse, out,
                               out_row_bytes, threads);
  });
}
