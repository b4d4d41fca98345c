// Float vectors of the machine's native width, and conversions of 16-bit floats.
//
// GCC vector extensions carry the arithmetic; intrinsics appear only where they pay, behind macros.
// Sources are compiled without contraction, so a multiply-add is fused only where `madd` says so.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define DIFFKV_AVX512 1
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(DIFFKV_AVX512)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define DIFFKV_AVX2 1
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <int N, class Body, int... I>
INLINE void each_of(Body&& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// Unrolled loop: `body` gets 0 .. N - 1 as types, so that arrays of vectors stay in registers.
template <int N, class Body>
INLINE void each(Body&& body) {
  each_of<N>(body, std::make_integer_sequence<int, N>{});
}

template <class V, class T>
INLINE V load(const T* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

template <class V, class T>
INLINE void store(T* to, V x) {
  std::memcpy(to, &x, sizeof(V));
}

INLINE Floats broadcast(float x) { return x - Floats{}; }
INLINE Ints broadcast(int32_t x) { return x + Ints{}; }

template <int... I>
INLINE Ints iota(std::integer_sequence<int, I...>) {
  return Ints{I...};
}
INLINE Ints iota() { return iota(std::make_integer_sequence<int, LANES>{}); }

INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }

// a * b + c, fused where the machine can.
INLINE Floats madd(Floats a, Floats b, Floats c) {
#if defined(DIFFKV_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(DIFFKV_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  Floats r;
  for (int l = 0; l < LANES; l++) r[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return r;
#else
  return a * b + c;
#endif
}

INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

INLINE float max_lane(Floats x) {
#if defined(DIFFKV_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int l = 1; l < LANES; l++) most = x[l] > most ? x[l] : most;
  return most;
#endif
}

INLINE float sum_lanes(Floats x) {
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int l = 0; l < width; l++) lanes[l] += lanes[l + width];
  return lanes[0];
}

// 2^x; 0 below 2^-126, NaN stays NaN. Taylor series of degree 7 on [-0.5, 0.5].
INLINE Floats exp2(Floats x) {
  const Floats floor_x = broadcast(-126.0f);
  const Floats clamped = x < floor_x ? floor_x : x;
#if defined(DIFFKV_AVX512)
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)clamped, 0);
#elif defined(DIFFKV_AVX2)
  const Floats whole = (Floats)_mm256_round_ps((__m256)clamped, 0);
#else
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats whole = (clamped + magic) - magic;
#endif
  const Floats r = clamped - whole;
  Floats y = broadcast(1.52527338e-5f);
  const float terms[] = {1.54035304e-4f,
                         1.33335581e-3f,
                         9.61812911e-3f,
                         5.55041087e-2f,
                         2.40226507e-1f,
                         6.93147181e-1f,
                         1.0f};
  each<7>([&](auto i) { y = madd(y, r, broadcast(terms[i])); });
  const Ints exponent = (to_ints(whole) + 127) << 23;
  y = y * (Floats)exponent;
  return x < floor_x ? Floats{} : y;
}

// Lane `l` of part 0 or 1 of one step of a transposed sum of vectors a and b (+ LANES): steps 1 and
// 2 pair lanes within 16 bytes, step 4 pairs runs of 16 bytes. Each is one shuffle instruction.
constexpr int paired_lane(int step, int l, int part) {
  const int base = l & ~3, i = l & 3, blocks = LANES / 4, block = l / 4;
  if (step == 1) return base + (i >> 1) + 2 * part + (i & 1) * LANES;
  if (step == 2) return base + (i & 1) + 2 * part + (i >> 1) * LANES;
  const int half = blocks > 1 ? blocks / 2 : 1;
  return (2 * (block % half) + part) * 4 + i + block / half * LANES;
}

template <int STEP, class V, int... L>
INLINE V add_pairs(V a, V b, std::integer_sequence<int, L...>) {
  const Ints first = {paired_lane(STEP, L, 0)...}, second = {paired_lane(STEP, L, 1)...};
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

template <int STEP, class V>
INLINE V add_pairs(V a, V b) {
  return add_pairs<STEP>(a, b, std::make_integer_sequence<int, LANES>{});
}

// Of four vectors: lane i of each 16 bytes is the sum of those 16 bytes of rows[i].
template <class V>
INLINE V sum_quad(const V* rows) {
  return add_pairs<2>(add_pairs<1>(rows[0], rows[1]), add_pairs<1>(rows[2], rows[3]));
}

// Of NUM results of `sum_quad`: neighbouring 16 bytes summed, in the order of the quads.
template <int NUM, class V>
INLINE V sum_quads(const V* quads) {
  if constexpr (NUM == 1) return quads[0];
  if constexpr (NUM == 2) return add_pairs<4>(quads[0], quads[1]);
  if constexpr (NUM == 4)
    return add_pairs<4>(add_pairs<4>(quads[0], quads[1]), add_pairs<4>(quads[2], quads[3]));
}

// Lane t of the result is the sum of the lanes of rows[t].
INLINE Floats sum_rows(const Floats* rows) {
  Floats quads[LANES / 4];
  each<LANES / 4>([&](auto q) { quads[q] = sum_quad(rows + 4 * q); });
  return sum_quads<LANES / 4>(quads);
}

// `count` <= LANES floats, the other lanes 0; nothing beyond them is touched.
INLINE Floats load_floats(const void* from, int count) {
#if defined(DIFFKV_AVX512)
  return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
  Floats x{};
  std::memcpy(&x, from, 4 * count);
  return x;
#endif
}

INLINE void store_floats(void* to, Floats x, int count) {
#if defined(DIFFKV_AVX512)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)x);
#else
  std::memcpy(to, &x, 4 * count);
#endif
}

INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 x;
  std::memcpy(&x, &h, 2);
  return x;
#else
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent, and normalises subnormals on the way.
  const float x = bits_to_float(magnitude << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(x));
#endif
}

// Round to nearest, ties to even.
INLINE uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#elif defined(__aarch64__)
  const __fp16 h = (__fp16)x;
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Adding 0.5 leaves the multiples of 2^-24, rounded, in the low bits.
    return sign | (uint16_t)(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

INLINE float from_bfloat(uint16_t b) { return bits_to_float((uint32_t)b << 16); }

// The low 16 bits of each lane as float16.
INLINE Floats from_halves(Ints x) {
#if defined(DIFFKV_AVX512)
  return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x));
#else
  Floats r;
  for (int l = 0; l < LANES; l++) r[l] = from_half((uint16_t)x[l]);
  return r;
#endif
}
