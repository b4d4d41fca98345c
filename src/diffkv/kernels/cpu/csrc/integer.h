// Dot products of codes in integers, four bytes a lane at once (AVX-512 VNNI).
//
// Codes are unsigned bytes already. The other factor, a query or the weights of a tile, becomes
// 16-bit integers times a step, each the sum of two signed bytes: 256 * first + second. A query's
// step is a power of two, so elements down to 2^-8 (bfloat16) or 2^-5 (float16) of the largest lose
// nothing. Weights lose 2^-16 of the tile's largest at most. Float32 models do not come here.
#pragma once

#include <limits>

#include "tile.h"

#if defined(DIFFKV_AVX512) && defined(__AVX512VNNI__)
#define DIFFKV_VNNI 1
#endif

constexpr int DIGITS = 2;
constexpr int CELL = 16;              // bytes of a row that make a vector with those of four tokens
constexpr float MOST_DIGITS = 32639;  // 256 * 127 + 127
constexpr float LEAST_WEIGHT = 1e-30f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

constexpr bool has_integers(Side side) {
#if defined(DIFFKV_VNNI)
  return side.bits != 16 && layout::DTYPE != FLOAT32;
#else
  return side.bits < 0;
#endif
}

// Whether sums over a vector fit 32 bits.
constexpr bool integer_keys(int tier) {
  const Side side = key_side(tier);
  return has_integers(side) && ((1ll << side.bits) - 1) * layout::HEAD_DIM < (1ll << 16);
}

constexpr int num_planes(Side side) { return side.bits < 8 ? 8 / side.bits : 1; }
constexpr int num_columns(Side side) { return (side.code_bytes + CELL - 1) / CELL; }

// One plane of one column of CELL bytes.
struct Cell {
  int column, plane, element, count, group;
};

constexpr Cell cell_of(Side side, int number) {
  const int column = number / num_planes(side), plane = number % num_planes(side);
  const int left = side.code_bytes - column * CELL;
  const int element = plane * side.code_bytes + column * CELL;
  return {column, plane, element, left < CELL ? left : CELL,
          element / (layout::HEAD_DIM / side.groups)};
}

constexpr int num_cells(Side side) { return num_columns(side) * num_planes(side); }

// Whether no cell crosses a group.
constexpr bool integer_values(int tier) {
  const Side side = value_side(tier);
  if (!has_integers(side)) return false;
  for (int i = 0; i < num_cells(side); i++) {
    const Cell cell = cell_of(side, i);
    if ((cell.element + cell.count - 1) / (layout::HEAD_DIM / side.groups) != cell.group)
      return false;
  }
  return true;
}

// Cells and query heads whose sums fit the registers at once.
constexpr int heads_at_once(int group) { return group < 2 ? group : 2; }
constexpr int cells_at_once(int group) { return 8 / heads_at_once(group); }

constexpr int integer_value_blocks(int tier, int group) {
  const int cells = cells_at_once(group), heads = heads_at_once(group);
  return (num_cells(value_side(tier)) + cells - 1) / cells * ((group + heads - 1) / heads);
}

template <int TIER, int NUMBER>
constexpr Cell CELL_OF = cell_of(value_side(TIER), NUMBER);

template <int TIER, int G>
struct IntegerQueries;

template <int TIER, int G, class Lines>
INLINE void add_integer_values(const Tile<TIER>& tile, int num,
                               const float (*weights)[G][tile_tokens(TIER)], const float* keep,
                               float (*out)[layout::HEAD_DIM], const Lines& lines);

#if defined(DIFFKV_VNNI)

INLINE Ints dot_bytes(Ints sum, __m512i codes, __m512i factors) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, codes, factors);
}

// x = 256 * first + second, by lane.
INLINE void store_digits(__m512i x, int8_t* first, int8_t* second) {
  const __m512i rounded = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128((__m128i*)first, _mm512_cvtepi32_epi8(rounded));
  _mm_storeu_si128((__m128i*)second, _mm512_cvtepi32_epi8(x));
}

template <int BITS>
INLINE __m512i plane_of(__m512i codes, int plane) {
  if constexpr (BITS == 8) return codes;
  if (plane > 0) codes = _mm512_srli_epi16(codes, plane * BITS);
  return _mm512_and_si512(codes, _mm512_set1_epi8((1 << BITS) - 1));
}

// COUNT bytes, the others 0; nothing beyond them is read.
template <int COUNT>
INLINE __m128i load_bytes_16(const uint8_t* from) {
  if constexpr (COUNT >= 16) return _mm_loadu_si128((const __m128i*)from);
  return _mm_maskz_loadu_epi8((__mmask16)((1u << COUNT) - 1), from);
}

template <int COUNT>
INLINE __m256i load_bytes_32(const uint8_t* from) {
  if constexpr (COUNT >= 32) return _mm256_loadu_si256((const __m256i*)from);
  return _mm256_maskz_loadu_epi8((__mmask32)((1ull << COUNT) - 1), from);
}

template <int COUNT>
INLINE __m512i load_bytes_64(const uint8_t* from) {
  if constexpr (COUNT >= 64) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi8((1ull << COUNT) - 1, from);
}

// COUNT bytes of each of NUM rows, rows[0], rows[step], ...: 64 / NUM bytes of the vector for each.
template <int NUM, int COUNT>
INLINE __m512i load_rows(const uint8_t* const* rows, int step, int offset) {
  if constexpr (NUM == 1) {
    return load_bytes_64<COUNT>(rows[0] + offset);
  } else if constexpr (NUM == 2) {
    const __m512i x = _mm512_castsi256_si512(load_bytes_32<COUNT>(rows[0] + offset));
    return _mm512_inserti64x4(x, load_bytes_32<COUNT>(rows[step] + offset), 1);
  } else {
    __m512i x = _mm512_castsi128_si512(load_bytes_16<COUNT>(rows[0] + offset));
    x = _mm512_inserti32x4(x, load_bytes_16<COUNT>(rows[step] + offset), 1);
    x = _mm512_inserti32x4(x, load_bytes_16<COUNT>(rows[2 * step] + offset), 2);
    return _mm512_inserti32x4(x, load_bytes_16<COUNT>(rows[3 * step] + offset), 3);
  }
}

// Queries of a block as digits, in the order of the codes of one or, if short, several rows.
template <int TIER, int G>
struct IntegerQueries {
  static constexpr Side side = key_side(TIER);
  static constexpr int N = side.code_bytes, GROUPS = side.groups, PLANES = num_planes(side);
  static constexpr int PACK = N <= 16 ? 4 : N <= 32 ? 2 : 1, BYTES = 64 / PACK;
  static constexpr int VECTORS = (N + BYTES - 1) / BYTES, WIDTH = layout::HEAD_DIM / GROUPS;

  struct Run {
    int first, last;  // bytes of a row
  };

  // The bytes of a vector and plane that belong to a group.
  static constexpr Run run(int vector, int plane, int group) {
    const int start = group * WIDTH - plane * N, stop = start + WIDTH;
    const int from = vector * BYTES, to = from + BYTES < N ? from + BYTES : N;
    return {start > from ? start : from, stop < to ? stop : to};
  }

  __m512i digits[GROUPS][G][DIGITS][VECTORS][PLANES];
  float sums[GROUPS][G];
  float steps[G];

  __attribute__((noinline)) explicit IntegerQueries(const uint8_t* query) {
    std::memset(digits, 0, sizeof(digits));
    for (int h = 0; h < G; h++) {
      float q[whole_vectors(layout::HEAD_DIM)] = {};
      load_row<layout::DTYPE>(query + h * ROW_BYTES, q, layout::HEAD_DIM);
      set_head(h, q);
    }
  }

  // Dot products with LANES rows: dots[group][h], by lane.
  INLINE void dot(const uint8_t* const* rows, Floats (*dots)[G]) const {
    constexpr int QUADS = 4 / PACK;
    Ints quads[GROUPS][G][QUADS];
    each<QUADS>([&](auto quad) {
      __m512i codes[4][VECTORS][PLANES];
      each<4>([&](auto i) {
        each<VECTORS>([&](auto v) {
          constexpr int COUNT = N - v * BYTES < BYTES ? N - v * BYTES : BYTES;
          const __m512i x = load_rows<PACK, COUNT>(rows + quad * 4 * PACK + i, 4, v * BYTES);
          each<PLANES>([&](auto p) { codes[i][v][p] = plane_of<side.bits>(x, p); });
        });
      });
      each<GROUPS>([&](auto g) {
        each<G>([&](auto h) {
          Ints sums_of_rows[4];
          each<4>([&](auto i) { sums_of_rows[i] = Ints{}; });
          each<DIGITS>([&](auto d) {
            if constexpr (d > 0) each<4>([&](auto i) { sums_of_rows[i] <<= 8; });
            each<VECTORS>([&](auto v) {
              each<PLANES>([&](auto p) {
                constexpr Run bytes = run(v, p, g);
                if constexpr (bytes.first < bytes.last)
                  each<4>([&](auto i) {
                    sums_of_rows[i] =
                        dot_bytes(sums_of_rows[i], codes[i][v][p], digits[g][h][d][v][p]);
                  });
              });
            });
          });
          quads[g][h][quad] = sum_quad(sums_of_rows);
        });
      });
    });
    each<GROUPS>([&](auto g) {
      each<G>([&](auto h) { dots[g][h] = to_floats(sum_quads<QUADS>(quads[g][h])) * steps[h]; });
    });
  }

 private:
  void set_head(int h, const float* q) {
    constexpr int PADDED = whole_vectors(layout::HEAD_DIM);
    Floats mosts{};
    for (int j = 0; j < PADDED; j += LANES) {
      const Floats x = load<Floats>(q + j), size = x < 0.0f ? -x : x;
      // Infinities and NaN, which a comparison would miss, count as infinite.
      mosts =
          maximum(size <= std::numeric_limits<float>::max() ? size : broadcast(INFINITE), mosts);
    }
    const float most = max_lane(mosts);
    const bool finite = most < INFINITE;
    int exponent;
    std::frexp(finite ? most / MOST_DIGITS : 0.0f, &exponent);
    const float step = std::ldexp(1.0f, exponent > -100 ? exponent : -100);
    const float per_step = finite ? 1.0f / step : 0.0f;
    steps[h] = finite ? step : std::numeric_limits<float>::quiet_NaN();
    int32_t whole[PADDED];
    int8_t bytes[DIGITS][PADDED];
    for (int j = 0; j < PADDED; j += LANES) {
      const __m512i x = _mm512_cvtps_epi32((__m512)(load<Floats>(q + j) * per_step));
      store(whole + j, x);
      store_digits(x, bytes[0] + j, bytes[1] + j);
    }
    for (int g = 0; g < GROUPS; g++) {
      int32_t sum = 0;
      for (int j = g * WIDTH; j < (g + 1) * WIDTH; j++) sum += whole[j];
      sums[g][h] = (float)sum * steps[h];
    }
    each<GROUPS>([&](auto g) {
      each<VECTORS>([&](auto v) {
        each<PLANES>([&](auto p) {
          constexpr Run r = run(v, p, g);
          if constexpr (r.first < r.last)
            for (int d = 0; d < DIGITS; d++)
              for (int i = 0; i < PACK; i++)
                std::memcpy((uint8_t*)&digits[g][h][d][v][p] + i * BYTES + r.first - v * BYTES,
                            bytes[d] + p * N + r.first, r.last - r.first);
        });
      });
    });
  }
};

// The bytes of four rows, four by four: byte 4 * i + r is byte i of row r.
template <int COUNT>
INLINE __m512i interleave(const uint8_t* const* rows, int offset) {
  const __m512i x = load_rows<4, COUNT>(rows, 1, offset);
  const Ints by_row = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32((__m512i)by_row, x),
                             _mm512_broadcast_i32x4(by_byte));
}

// Weights of a tile as digits, and their steps.
template <int TIER, int G>
struct IntegerWeights {
  static constexpr int GROUPS = num_groups(value_side(TIER));
  alignas(LINE_BYTES) int8_t digits[GROUPS][G][DIGITS][tile_tokens(TIER)];
  float steps[GROUPS][G];

  INLINE IntegerWeights(const float (*weights)[G][tile_tokens(TIER)], int num) {
    for (int g = 0; g < GROUPS; g++)
      for (int h = 0; h < G; h++) {
        const float* from = weights[g][h];
        Floats mosts = broadcast(LEAST_WEIGHT);
        for (int t = 0; t < num; t += LANES) mosts = maximum(load<Floats>(from + t), mosts);
        const float most = max_lane(mosts), per_step = MOST_DIGITS / most;
        steps[g][h] = most / MOST_DIGITS;
        for (int t = 0; t < num; t += LANES) {
          const __m512i x = _mm512_cvtps_epi32((__m512)(load<Floats>(from + t) * per_step));
          store_digits(x, digits[g][h][0] + t, digits[g][h][1] + t);
        }
      }
  }
};

// Sums of WIDTH cells from FIRST on for HEADS query heads from FIRST_HEAD on.
template <int TIER, int G, int FIRST, int WIDTH, int FIRST_HEAD, int HEADS, int BLOCK, class Lines>
INLINE void add_cells(const __m512i (*rows)[tile_tokens(TIER) / 4], int num,
                      const IntegerWeights<TIER, G>& factors, const float* keep,
                      float (*out)[layout::HEAD_DIM], const Lines& lines) {
  constexpr Side side = value_side(TIER);
  // An array that starts as {} would stay in memory.
  Ints sums[WIDTH][HEADS][DIGITS];
  each<WIDTH * HEADS * DIGITS>(
      [&](auto i) { sums[i / (HEADS * DIGITS)][i / DIGITS % HEADS][i % DIGITS] = Ints{}; });
  for (int t = 0; t < num; t += 4) {
    lines.value_step(BLOCK, t);
    each<WIDTH>([&](auto c) {
      constexpr Cell cell = CELL_OF<TIER, FIRST + c.value>;
      const __m512i codes = plane_of<side.bits>(rows[cell.column][t / 4], cell.plane);
      each<HEADS * DIGITS>([&](auto i) {
        constexpr int h = i / DIGITS, d = i % DIGITS;
        int32_t four;
        std::memcpy(&four, factors.digits[cell.group][FIRST_HEAD + h][d] + t, 4);
        sums[c][h][d] = dot_bytes(sums[c][h][d], codes, _mm512_set1_epi32(four));
      });
    });
  }
  each<WIDTH * HEADS>([&](auto i) {
    constexpr int c = i / HEADS, h = i % HEADS, head = FIRST_HEAD + h;
    constexpr Cell cell = CELL_OF<TIER, FIRST + c>;
    float* to = out[head] + cell.element;
    const Floats sum = madd(to_floats(sums[c][h][0]), broadcast(256.0f), to_floats(sums[c][h][1]));
    const Floats old = load_floats(to, cell.count) * keep[head];
    store_floats(to, madd(sum, broadcast(factors.steps[cell.group][head]), old), cell.count);
  });
}

// out[h] = out[h] * keep[h] + sum over tokens of weights[group][h][token] * value codes.
template <int TIER, int G, class Lines>
INLINE void add_integer_values(const Tile<TIER>& tile, int num,
                               const float (*weights)[G][tile_tokens(TIER)], const float* keep,
                               float (*out)[layout::HEAD_DIM], const Lines& lines) {
  constexpr Side side = value_side(TIER);
  constexpr int CELLS = cells_at_once(G), HEADS = heads_at_once(G);
  const IntegerWeights<TIER, G> factors(weights, num);
  // Interleaved once, for all blocks of cells and heads read them.
  __m512i rows[num_columns(side)][tile_tokens(TIER) / 4];
  for (int t = 0; t < num; t += 4) {
    each<num_columns(side)>([&](auto column) {
      rows[column][t / 4] = interleave<cell_of(side, column * num_planes(side)).count>(
          tile.values + t, column * CELL);
    });
  }
  each<(num_cells(side) + CELLS - 1) / CELLS>([&](auto block) {
    constexpr int FIRST = block * CELLS, WIDTH = std::min(CELLS, num_cells(side) - FIRST);
    constexpr int PARTS = (G + HEADS - 1) / HEADS;
    each<PARTS>([&](auto part) {
      constexpr int HEAD = part * HEADS, NUM = std::min(HEADS, G - HEAD);
      constexpr int BLOCK = block * PARTS + part;
      add_cells<TIER, G, FIRST, WIDTH, HEAD, NUM, BLOCK>(rows, num, factors, keep, out, lines);
    });
  });
}

#endif
