// Tiles: neighbouring tokens of one head and tier, wherever their pages lie.
//
// A page seldom holds a whole number of vectors of tokens. So rows are found through pointers and
// the small (scale, zero) pairs are copied, and the loops over tokens need not know of pages.
#pragma once

#include <algorithm>

#include "codes.h"

constexpr int LINE_BYTES = 64;  // of the machine's caches

// Neighbouring pages of one head and tier.
struct Item {
  int64_t request, head, row;
  int64_t open;  // the open row of its request, which may be this one
  int tier, first_page, num_tokens;
  int64_t kept;  // place of its scores among those that are kept; -1 if they are not
};

// Tokens of a tile: a tile and the next, which is being asked for, share the first cache.
constexpr int tile_tokens(int tier) {
  const int token_bytes = layout::PAGE_BYTES / tokens_per_page(tier);
  return token_bytes <= 128 ? 128 : token_bytes <= 256 ? 64 : 32;
}

constexpr int whole_vectors(int tokens) { return (tokens + LANES - 1) / LANES * LANES; }

template <int TIER>
struct Tile {
  static constexpr Side K = key_side(TIER), V = value_side(TIER);
  static constexpr int T = tokens_per_page(TIER);
  static constexpr int PAD_BYTES = LINE_BYTES;  // what `load_strided` may read beyond the last

  const uint8_t *keys[tile_tokens(TIER)], *values[tile_tokens(TIER)];
  alignas(LINE_BYTES) uint8_t k_meta[tile_tokens(TIER) * K.meta_bytes() + PAD_BYTES];
  alignas(LINE_BYTES) uint8_t v_meta[tile_tokens(TIER) * V.meta_bytes() + PAD_BYTES];

  // Find `num` tokens of an item from token `start` on. Up to a whole vector, rows repeat the last
  // one and meta is zero.
  __attribute__((noinline)) void find(const Pool& pool, const Item& item, int start, int num) {
    int number = item.first_page + start / T, index = start % T;
    for (int t = 0; t < num; number++, index = 0) {
      const uint8_t* page = pool.page(pool.entry(item.row, TIER, number));
      const int count = std::min(T - index, num - t);
      for (int i = 0; i < count; i++) {
        keys[t + i] = page + K.codes + (index + i) * K.code_bytes;
        values[t + i] = page + V.codes + (index + i) * V.code_bytes;
      }
      copy<K>(k_meta, t, page, index, count);
      copy<V>(v_meta, t, page, index, count);
      t += count;
    }
    const int padded = whole_vectors(num);
    for (int t = num; t < padded; t++) {
      keys[t] = keys[num - 1];
      values[t] = values[num - 1];
    }
    std::memset(k_meta + num * K.meta_bytes(), 0, (padded - num) * K.meta_bytes());
    std::memset(v_meta + num * V.meta_bytes(), 0, (padded - num) * V.meta_bytes());
  }

 private:
  template <const Side& SIDE>
  static void copy(uint8_t* meta, int t, const uint8_t* page, int index, int count) {
    constexpr int BYTES = SIDE.meta_bytes();
    std::memcpy(meta + t * BYTES, page + SIDE.meta + index * BYTES, count * BYTES);
  }
};

// Lines of a tile of full pages.
constexpr int tile_lines(int tier) {
  return tile_tokens(tier) * layout::PAGE_BYTES / tokens_per_page(tier) / LINE_BYTES + 1;
}

// Where lines are asked for: the second cache. The first one can wait for fewer lines at once.
constexpr int SECOND_CACHE = 2;

// Which lines to ask for at each step of a tile, half of them while it is scored: all at once would
// fill the queue of misses, and pages are too small for the machine's own prefetchers.
template <int TIER, int VALUE_BLOCKS>
struct Schedule {
  static constexpr int HALF = tile_lines(TIER) / 2 + 1;
  static constexpr int SCORE_STEPS = tile_tokens(TIER) / LANES,
                       VALUE_STEPS = VALUE_BLOCKS * tile_tokens(TIER) / 4;
  static constexpr int PER_SCORE = (HALF + SCORE_STEPS - 1) / SCORE_STEPS;
  static constexpr int PER_VALUE = (HALF + VALUE_STEPS - 1) / VALUE_STEPS;
  static constexpr int NUM = SCORE_STEPS * PER_SCORE + VALUE_STEPS * PER_VALUE;

  const uint8_t* lines[NUM];

  INLINE void score_step(int start) const {
    for (int i = 0; i < PER_SCORE; i++)
      __builtin_prefetch(lines[start / LANES * PER_SCORE + i], 0, SECOND_CACHE);
  }
  INLINE void value_step(int block, int t) const {
    const int step = block * (tile_tokens(TIER) / 4) + t / 4;
    for (int i = 0; i < PER_VALUE; i++)
      __builtin_prefetch(lines[SCORE_STEPS * PER_SCORE + step * PER_VALUE + i], 0, SECOND_CACHE);
  }
};

// Walks over the lines of one item's pages, then of the next item's.
class Ahead {
 public:
  explicit Ahead(const Pool& pool) : pool_(pool) {}

  // The item that follows the one that is being walked over.
  void follow(const Item* next) { next_ = next; }

  void start(const Item& item) {
    row_ = item.row;
    tier_ = item.tier;
    number_ = item.first_page;
    const int T = layout::TIERS[item.tier].tokens_per_page;
    pages_ = (item.num_tokens + T - 1) / T;
    tile_lines_ = tile_lines(item.tier);
    lines_ = 0;
  }

  // The lines of the next tile; the last one repeated where there are fewer than `num`.
  __attribute__((noinline)) void take(const uint8_t** lines, int num) {
    int i = 0;
    const int most = std::min(num, tile_lines_);
    while (i < most && (lines_ > 0 || next_page())) {
      const int count = std::min(lines_, most - i);
      for (int k = 0; k < count; k++) lines[i + k] = at_ + k * LINE_BYTES;
      at_ += count * LINE_BYTES;
      lines_ -= count;
      i += count;
    }
    std::fill(lines + i, lines + num, at_ - LINE_BYTES);
  }

 private:
  bool next_page() {
    if (pages_ == 0) {
      if (next_ == nullptr) return false;
      start(*next_);
      next_ = nullptr;
    }
    at_ = pool_.page(pool_.entry(row_, tier_, number_++));
    pages_--;
    lines_ = (layout::PAGE_BYTES + LINE_BYTES - 1) / LINE_BYTES;
    return true;
  }

  const Pool& pool_;
  const Item* next_ = nullptr;
  const uint8_t* at_ = nullptr;
  int64_t row_ = 0;
  int tier_ = HIGH, number_ = 0, pages_ = 0, lines_ = 0, tile_lines_ = 0;
};
