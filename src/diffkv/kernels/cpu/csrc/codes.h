// How codes of a page become float lanes: a vector is cut into chunks of at most LANES elements.
//
// No chunk crosses a plane (bits of one position in a byte) or a group, so a chunk is a run of
// bytes, one shift, and one (scale, zero). Chunks are in element order; all is known when this is
// compiled.
#pragma once

#include "pool.h"

struct Chunk {
  int element;  // index of the first element
  int count;    // elements, at most LANES
  int byte;     // where the chunk starts in a vector's codes
  int shift;    // of each byte
  int group;
};

// The chunk that starts at `element`.
constexpr Chunk chunk_at(Side side, int element) {
  if (side.bits == 16) {
    const int left = layout::HEAD_DIM - element;
    return {element, left < LANES ? left : LANES, element * dtype_bytes(layout::DTYPE), 0, 0};
  }
  const int plane = element / side.code_bytes, group_width = layout::HEAD_DIM / side.groups;
  const int group = element / group_width;
  int stop = (plane + 1) * side.code_bytes;
  if ((group + 1) * group_width < stop) stop = (group + 1) * group_width;
  if (element + LANES < stop) stop = element + LANES;
  return {element, stop - element, element % side.code_bytes, plane * side.bits, group};
}

constexpr int num_chunks(Side side) {
  int num = 0;
  for (int j = 0; j < layout::HEAD_DIM; num++) j += chunk_at(side, j).count;
  return num;
}

constexpr Chunk chunk_of(Side side, int number) {
  int element = 0;
  for (int i = 0; i < number; i++) element += chunk_at(side, element).count;
  return chunk_at(side, element);
}

constexpr int num_groups(Side side) { return side.bits == 16 ? 1 : side.groups; }

// Of namespace scope, because GCC does not capture constexpr structs in nested lambdas.
template <int TIER, bool KEY>
constexpr Side SIDE = KEY ? key_side(TIER) : value_side(TIER);
template <int TIER, bool KEY, int NUMBER>
constexpr Chunk CHUNK = chunk_of(SIDE<TIER, KEY>, NUMBER);

// Codes of a chunk as floats, lanes past `COUNT` undefined but finite; `from` is where they start.
template <int BITS, int SHIFT, int COUNT>
INLINE Floats unpack(const uint8_t* from) {
  if constexpr (BITS == 16) {
    return load_elements<layout::DTYPE>(from, COUNT);
  } else {
    constexpr int MASK = (1 << BITS) - 1;
#if defined(DIFFKV_AVX512)
    const __m128i raw = COUNT == LANES ? _mm_loadu_si128((const __m128i*)from)
                                       : _mm_maskz_loadu_epi8((1u << COUNT) - 1, from);
    __m512i x = _mm512_cvtepu8_epi32(raw);
    if constexpr (SHIFT > 0) x = _mm512_srli_epi32(x, SHIFT);
    if constexpr (BITS == 8) return (Floats)_mm512_cvtepi32_ps(x);
    // A table look-up reads the low four bits of a lane: it masks and converts at once.
    const Floats table = to_floats(iota() & MASK);
    return (Floats)_mm512_permutexvar_ps(x, (__m512)table);
#else
    uint8_t raw[LANES] = {};
    std::memcpy(raw, from, COUNT);
#if defined(DIFFKV_AVX2)
    const Ints x = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)raw));
#else
    Ints x;
    for (int l = 0; l < LANES; l++) x[l] = raw[l];
#endif
    return to_floats((x >> SHIFT) & MASK);
#endif
  }
}

// Lanes from[0], from[STRIDE], from[2 * STRIDE], ...: reads up to STRIDE * LANES values.
template <int STRIDE>
INLINE Ints load_strided(const uint8_t* from) {
  if constexpr (STRIDE == 1) {
    return load<Ints>(from);
  } else {
    const Ints low = load_strided<STRIDE / 2>(from);
    const Ints high = load_strided<STRIDE / 2>(from + STRIDE / 2 * LANES * 4);
    return __builtin_shuffle(low, high, iota() * 2);
  }
}

// (scale, zero) of one group for LANES neighbouring tokens.
template <int GROUPS>
INLINE void load_meta(const uint8_t* from, int group, Floats* scale, Floats* zero) {
  const Ints x = load_strided<GROUPS>(from + group * 4);
  *scale = from_halves(x);
  *zero = from_halves(x >> 16);
}
