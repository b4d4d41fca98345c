// The dtypes of models: rows of them to and from float.
#pragma once

#include "simd.h"

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));

constexpr int32_t QUIET_NAN = 0x7fc0;  // the bfloat16 that torch writes for any NaN

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

// Round to nearest, ties to even.
template <int DTYPE>
INLINE void store_elements(uint8_t* to, Floats x, int count) {
  if constexpr (DTYPE == FLOAT32) {
    std::memcpy(to, &x, 4 * count);
  } else if constexpr (DTYPE == BFLOAT16) {
    const Ints bits = (Ints)x;
    const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Shorts raw = __builtin_convertvector(x == x ? rounded : broadcast(QUIET_NAN), Shorts);
    std::memcpy(to, &raw, 2 * count);
  } else {
#if defined(DIFFKV_AVX512)
    const __m256i raw = _mm512_cvtps_ph((__m512)x, 0);
#else
    uint16_t raw[LANES];
    for (int l = 0; l < LANES; l++) raw[l] = to_half(x[l]);
#endif
    std::memcpy(to, &raw, 2 * count);
  }
}

// Whole vectors first, so that their size is known where they are compiled; then what is left.
template <int DTYPE>
inline void load_row(const void* from, float* to, int num) {
  const uint8_t* bytes = (const uint8_t*)from;
  int j = 0;
  for (; j + LANES <= num; j += LANES)
    store(to + j, load_elements<DTYPE>(bytes + j * dtype_bytes(DTYPE), LANES));
  if (j < num) {
    const Floats x = load_elements<DTYPE>(bytes + j * dtype_bytes(DTYPE), num - j);
    std::memcpy(to + j, &x, 4 * (num - j));
  }
}

template <int DTYPE>
inline void store_row(void* to, const float* from, int num) {
  uint8_t* bytes = (uint8_t*)to;
  int j = 0;
  for (; j + LANES <= num; j += LANES)
    store_elements<DTYPE>(bytes + j * dtype_bytes(DTYPE), load<Floats>(from + j), LANES);
  if (j < num) {
    Floats x{};
    std::memcpy(&x, from + j, 4 * (num - j));
    store_elements<DTYPE>(bytes + j * dtype_bytes(DTYPE), x, num - j);
  }
}
