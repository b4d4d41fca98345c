// Products of bfloat16 matrices by the CPU's tiles (AMX), where it has them and the system allows
// it.
#pragma once

#include <algorithm>

#include "simd.h"

#if defined(__AMX_BF16__) && defined(DIFFKV_AVX512) && defined(__linux__)
#define DIFFKV_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int SIDE = 16;         // rows of a tile, and words of a row
constexpr int DEPTH = 2 * SIDE;  // bfloat16 elements of a row

#if defined(DIFFKV_AMX)

// Instructions on tiles are illegal until a process has asked for them.
inline bool may_use_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of <asm/prctl.h>
  static const bool may = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return may;
}

// While it lives a thread has full tiles, if it wants any; then those that other code may count on.
class Tiles {
  struct alignas(64) Config {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Config before;
  bool wanted;

 public:
  explicit Tiles(bool wanted) : wanted(wanted) {
    if (!wanted) return;
    _tile_storeconfig(&before);
    Config full;
    full.palette = 1;
    std::fill_n(full.row_bytes, 8, (uint16_t)(2 * DEPTH));
    std::fill_n(full.rows, 8, (uint8_t)SIDE);
    _tile_loadconfig(&full);
  }
  ~Tiles() {
    if (wanted) _tile_loadconfig(&before);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// to[j][i] = from[i][j], SIDE by SIDE words; rows of `from` are the given words apart.
INLINE void transpose(const uint32_t* const* from, uint32_t* to) {
  __m512i x[SIDE], y[SIDE];
  each<SIDE>([&](auto i) { x[i.value] = _mm512_loadu_si512(from[i.value]); });
  each<SIDE / 2>([&](auto i) {
    y[2 * i.value] = _mm512_unpacklo_epi32(x[2 * i.value], x[2 * i.value + 1]);
    y[2 * i.value + 1] = _mm512_unpackhi_epi32(x[2 * i.value], x[2 * i.value + 1]);
  });
  // Words 4 l + j of rows 4 i ..: x[4 i + j], l counts quarters
  each<SIDE / 4>([&](auto i) {
    constexpr int at = 4 * i.value;
    x[at] = _mm512_unpacklo_epi64(y[at], y[at + 2]);
    x[at + 1] = _mm512_unpackhi_epi64(y[at], y[at + 2]);
    x[at + 2] = _mm512_unpacklo_epi64(y[at + 1], y[at + 3]);
    x[at + 3] = _mm512_unpackhi_epi64(y[at + 1], y[at + 3]);
  });
  each<SIDE / 4>([&](auto j) {
    constexpr int at = j.value;
    const __m512i low = _mm512_shuffle_i32x4(x[at], x[at + 4], 0x88);  // quarters 0 and 2
    const __m512i high = _mm512_shuffle_i32x4(x[at], x[at + 4], 0xdd);
    const __m512i low_2 = _mm512_shuffle_i32x4(x[at + 8], x[at + 12], 0x88);
    const __m512i high_2 = _mm512_shuffle_i32x4(x[at + 8], x[at + 12], 0xdd);
    _mm512_storeu_si512(to + at * SIDE, _mm512_shuffle_i32x4(low, low_2, 0x88));
    _mm512_storeu_si512(to + (at + 4) * SIDE, _mm512_shuffle_i32x4(high, high_2, 0x88));
    _mm512_storeu_si512(to + (at + 8) * SIDE, _mm512_shuffle_i32x4(low, low_2, 0xdd));
    _mm512_storeu_si512(to + (at + 12) * SIDE, _mm512_shuffle_i32x4(high, high_2, 0xdd));
  });
}

#else

inline bool may_use_tiles() { return false; }

struct Tiles {
  explicit Tiles(bool) {}
};

#endif
