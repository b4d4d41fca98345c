// The dtypes of models: rows of them to and from float.
#pragma once

#include "simd.h"

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int dtype_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// `count` <= LANES elements at `from`, the other lanes 0; nothing beyond them is read.
template <int DTYPE>
INLINE Floats load_elements(const uint8_t* from, int count) {
  if constexpr (DTYPE == FLOAT32) {
    if (count == LANES) return load<Floats>(from);
    Floats x{};
    std::memcpy(&x, from, 4 * count);
    return x;
  } else {
#if defined(DIFFKV_AVX512)
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, from);
    if constexpr (DTYPE == BFLOAT16)
      return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
    else
      return (Floats)_mm512_cvtph_ps(raw);
#else
    uint16_t raw[LANES] = {};
    std::memcpy(raw, from, 2 * count);
    Floats x;
    for (int l = 0; l < LANES; l++)
      x[l] = DTYPE == BFLOAT16 ? from_bfloat(raw[l]) : from_half(raw[l]);
    return x;
#endif
  }
}

template <int DTYPE>
INLINE void store_elements(uint8_t* to, Floats x, int count) {
  if constexpr (DTYPE == FLOAT32) {
    std::memcpy(to, &x, 4 * count);
  } else {
    uint16_t raw[LANES];
    for (int l = 0; l < LANES; l++)
      raw[l] = DTYPE == BFLOAT16 ? to_bfloat(x[l]) : to_half(x[l]);
    std::memcpy(to, raw, 2 * count);
  }
}

template <int DTYPE>
inline void load_row(const void* from, float* to, int num) {
  const uint8_t* bytes = (const uint8_t*)from;
  for (int j = 0; j < num; j += LANES) {
    const int count = num - j < LANES ? num - j : LANES;
    const Floats x = load_elements<DTYPE>(bytes + j * dtype_bytes(DTYPE), count);
    std::memcpy(to + j, &x, 4 * count);
  }
}

template <int DTYPE>
inline void store_row(void* to, const float* from, int num) {
  uint8_t* bytes = (uint8_t*)to;
  for (int j = 0; j < num; j += LANES) {
    const int count = num - j < LANES ? num - j : LANES;
    Floats x{};
    std::memcpy(&x, from + j, 4 * count);
    store_elements<DTYPE>(bytes + j * dtype_bytes(DTYPE), x, count);
  }
}
