// Dot products of codes in floats: any machine, any format.
#pragma once

#include "tile.h"

constexpr int rows_at_once(int group) {
  const int tokens = group == 1 ? 8 : group <= 4 ? 4 : 2;
  return tokens < LANES ? tokens : LANES;
}

// Queries of a block in the order of a tier's key chunks, and their sums by group.
template <int TIER, int G>
struct FloatQueries {
  static constexpr Side side = SIDE<TIER, true>;
  Floats chunks[num_chunks(side)][G];
  float sums[num_groups(side)][G];

  explicit FloatQueries(const uint8_t* query) {
    std::memset(sums, 0, sizeof(sums));
    for (int h = 0; h < G; h++) {
      float q[layout::HEAD_DIM];
      load_row<layout::DTYPE>(query + h * ROW_BYTES, q, layout::HEAD_DIM);
      each<num_chunks(side)>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, true, c.value>;
        chunks[c][h] = load_floats(q + chunk.element, chunk.count);
        sums[chunk.group][h] += sum_lanes(chunks[c][h]);
      });
    }
  }

  // Dot products with LANES rows: dots[group][h], by lane.
  INLINE void dot(const uint8_t* const* rows, Floats (*dots)[G]) const {
    constexpr int NUM = num_chunks(side), ROWS = rows_at_once(G);
    Floats sums_of_rows[num_groups(side)][G][LANES];
    for (int t = 0; t < LANES; t += ROWS) {
      Floats partial[G][ROWS];
      each<G>([&](auto h) { each<ROWS>([&](auto i) { partial[h][i] = Floats{}; }); });
      each<NUM>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, true, c.value>;
        Floats k[ROWS];
        each<ROWS>([&](auto i) {
          k[i] = unpack<side.bits, chunk.shift, chunk.count>(rows[t + i] + chunk.byte);
        });
        each<G>([&](auto h) {
          each<ROWS>([&](auto i) { partial[h][i] = madd(chunks[c][h], k[i], partial[h][i]); });
        });
        constexpr int next_group = c + 1 < NUM ? chunk_of(side, c.value + 1).group : -1;
        if constexpr (next_group != chunk.group)
          each<G>([&](auto h) {
            each<ROWS>([&](auto i) {
              sums_of_rows[chunk.group][h][t + i] = partial[h][i];
              partial[h][i] = Floats{};
            });
          });
      });
    }
    for (int g = 0; g < num_groups(side); g++)
      each<G>([&](auto h) { dots[g][h] = sum_rows(sums_of_rows[g][h]); });
  }
};

constexpr int chunks_at_once(int group, int num) {
  const int chunks = group == 1 ? 8 : group <= 8 ? (group <= 5 ? 16 / group : 2) : 1;
  return chunks < num ? chunks : num;
}

constexpr int float_value_blocks(int tier, int group) {
  const int num = num_chunks(value_side(tier)), at_once = chunks_at_once(group, num);
  return (num + at_once - 1) / at_once;
}

// out[h] = out[h] * keep[h] + sum over tokens of weights[group][h][token] * value codes.
template <int TIER, int G, class Lines>
INLINE void add_float_values(const Tile<TIER>& tile, int num,
                             const float (*weights)[G][tile_tokens(TIER)], const float* keep,
                             float (*out)[layout::HEAD_DIM], const Lines& lines) {
  constexpr const Side& side = SIDE<TIER, false>;
  constexpr int NUM = num_chunks(side), AT_ONCE = chunks_at_once(G, NUM);
  each<float_value_blocks(TIER, G)>([&](auto block) {
    constexpr int FIRST = block * AT_ONCE, WIDTH = NUM - FIRST < AT_ONCE ? NUM - FIRST : AT_ONCE;
    Floats sums[G][WIDTH];
    each<G>([&](auto h) {
      each<WIDTH>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, false, FIRST + c.value>;
        sums[h][c] = load_floats(out[h] + chunk.element, chunk.count) * keep[h];
      });
    });
    for (int t = 0; t < num; t++) {
      if (t % 4 == 0) lines.value_step(block, t);
      each<WIDTH>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, false, FIRST + c.value>;
        const Floats v = unpack<side.bits, chunk.shift, chunk.count>(tile.values[t] + chunk.byte);
        each<G>([&](auto h) {
          sums[h][c] = madd(broadcast(weights[chunk.group][h][t]), v, sums[h][c]);
        });
      });
    }
    each<G>([&](auto h) {
      each<WIDTH>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, false, FIRST + c.value>;
        store_floats(out[h] + chunk.element, sums[h][c], chunk.count);
      });
    });
  });
}
