// quantize and dequantize of plain tensors: any bits, groups and head_dim, known only at run time.

#include <vector>

#include "element.h"
#include "quantizer.h"

namespace {

template <int BITS, int DTYPE>
void encode_rows(const uint8_t* x, int64_t num, int dim, int groups, uint8_t* codes, uint8_t* meta,
                 int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(dim);
    std::vector<uint8_t> scratch(dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num; i++) {
      load_row<DTYPE>(x + i * dim * dtype_bytes(DTYPE), row.data(), dim);
      encode(row.data(), scratch.data(), dim, BITS, groups, codes + i * (dim * BITS / 8),
             meta + i * groups * 4);
    }
  }
}

template <int BITS, int DTYPE>
void decode_rows(const uint8_t* codes, const uint8_t* meta, int64_t num, int dim, int groups,
                 uint8_t* x, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(dim);
    std::vector<uint8_t> scratch(dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num; i++) {
      decode(codes + i * (dim * BITS / 8), meta + i * groups * 4, dim, BITS, groups, scratch.data(),
             row.data());
      store_row<DTYPE>(x + i * dim * dtype_bytes(DTYPE), row.data(), dim);
    }
  }
}

// Calls body with the bits and the dtype as types.
template <class Body>
void specialise(int bits, int dtype, Body&& body) {
  each<4>([&](auto log_bits) {
    each<3>([&](auto each_dtype) {
      constexpr int BITS = 1 << log_bits.value;
      if (bits == BITS && dtype == each_dtype.value)
        body(std::integral_constant<int, BITS>{}, each_dtype);
    });
  });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void diffkv_quantize(const uint8_t* x, int64_t num, int dim, int dtype, int bits, int groups,
                            uint8_t* codes, uint8_t* meta, int threads) {
  specialise(bits, dtype, [&](auto BITS, auto DTYPE) {
    encode_rows<BITS.value, DTYPE.value>(x, num, dim, groups, codes, meta, threads);
  });
}

EXPORT void diffkv_dequantize(const uint8_t* codes, const uint8_t* meta, int64_t num, int dim,
                              int dtype, int bits, int groups, uint8_t* x, int threads) {
  specialise(bits, dtype, [&](auto BITS, auto DTYPE) {
    decode_rows<BITS.value, DTYPE.value>(codes, meta, num, dim, groups, x, threads);
  });
}
