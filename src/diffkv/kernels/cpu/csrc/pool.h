// A pool as C++ sees it: its tensors, and the rendered layout of its pages.
//
// `constants.h` is rendered from `diffkv.layout.PageLayout` and `diffkv.state.TENSORS`; nothing
// here repeats its numbers and fields.
#pragma once

#include "constants.h"
#include "element.h"
#include "quantizer.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int HIGH = 0, LOW = 1;
constexpr int NUM_TIERS = sizeof(layout::TIERS) / sizeof(layout::TIERS[0]);
constexpr int ROW_BYTES = layout::HEAD_DIM * dtype_bytes(layout::DTYPE);

// What an operation returns; the Python side turns the others into errors.
enum Status : int { OK = 0, TABLE_FULL = 1, PLACE_TOO_SHORT = 2, NEGATIVE = 3 };

// What operations do with a pool's tensors; a leaf names 1 << leaf_shift pages.
struct Pool : Tensors {
  uint8_t* page(int64_t id) const { return pages + id * layout::PAGE_BYTES; }

  // Row of (slot, layer, head) in the tables.
  int64_t row(int64_t slot, int64_t layer, int64_t head) const {
    return (slot * num_layers + layer) * num_kv_heads + head;
  }
  // Add `times` the row's centre to x, in float32; layouts without centres have none to add.
  void add_centre(int64_t row, float times, float* x) const {
    if constexpr (layout::CENTRED) {
      float centre[layout::HEAD_DIM];
      load_row<BFLOAT16>(centres + row * layout::HEAD_DIM, centre, layout::HEAD_DIM);
      for (int j = 0; j < layout::HEAD_DIM; j++) x[j] += times * centre[j];
    }
  }
  int32_t& tokens(int64_t row, int tier) const { return num_tokens[row * 2 + tier]; }
  int32_t& held(int64_t row, int tier) const { return num_pages_held[row * 2 + tier]; }

  // Leaf number `number` of a row in a tier: low ones from the right.
  int32_t& leaf(int64_t row, int tier, int64_t number) const {
    return directory[row * directory_width +
                     (tier == HIGH ? number : directory_width - 1 - number)];
  }
  // Entry of a row's page number `number` of a tier.
  int32_t& entry(int64_t row, int tier, int64_t number) const {
    const int64_t id = leaf(row, tier, number >> leaf_shift);
    return leaves[(id << leaf_shift) + (number & ((1 << leaf_shift) - 1))];
  }
  // Leaves that name so many pages of one tier.
  int64_t leaves_of(int64_t pages) const { return (pages + (1 << leaf_shift) - 1) >> leaf_shift; }

  // Leaves of a row, of both tiers.
  int64_t leaves_held(int64_t row) const {
    return leaves_of(held(row, HIGH)) + leaves_of(held(row, LOW));
  }

  // Whether the next page of a row in a tier is the first of a leaf.
  bool wants_leaf(int64_t row, int tier) const {
    return (held(row, tier) & ((1 << leaf_shift) - 1)) == 0;
  }

  // Enter a page as the last one of a row in a tier; `leaf_id` counts if the row wants a leaf.
  void enter(int64_t row, int tier, int32_t page, int32_t leaf_id) const {
    const int64_t number = held(row, tier);
    if (wants_leaf(row, tier)) leaf(row, tier, number >> leaf_shift) = leaf_id;
    entry(row, tier, number) = page;
    held(row, tier)++;
  }

  // Entry `k` of a ring, of pages or of leaves.
  int32_t& ring(int64_t k) const { return free_ring[k % num_pages]; }
  int32_t& leaf_ring(int64_t k) const { return free_leaves[k % num_leaves]; }
};

// One side (key or value) of a token in a page.
struct Side {
  int bits, groups, code_bytes, codes, meta;

  constexpr int meta_bytes() const { return bits == 16 ? 0 : groups * 4; }
};

constexpr Side key_side(int tier) {
  return {layout::TIERS[tier].k_bits, layout::TIERS[tier].k_groups,
          layout::TIERS[tier].k_code_bytes, layout::TIERS[tier].k_codes,
          layout::TIERS[tier].k_meta};
}

constexpr Side value_side(int tier) {
  return {layout::TIERS[tier].v_bits, layout::TIERS[tier].v_groups,
          layout::TIERS[tier].v_code_bytes, layout::TIERS[tier].v_codes,
          layout::TIERS[tier].v_meta};
}

constexpr int tokens_per_page(int tier) { return layout::TIERS[tier].tokens_per_page; }

// Whether the tier's tokens have sums and positions: a decision may read them.
constexpr bool is_tracked(int tier) { return layout::TIERS[tier].tracked; }

// Calls body with the tier as a type.
template <class Body>
INLINE void with_tier(int tier, Body&& body) {
  each<NUM_TIERS>([&](auto each_tier) {
    if (tier == each_tier.value) body(each_tier);
  });
}

// Quantise x (overwritten) into place `index` of a page.
template <int TIER, bool KEY>
INLINE void write_side(uint8_t* page, int index, float* x) {
  constexpr Side side = KEY ? key_side(TIER) : value_side(TIER);
  uint8_t* codes = page + side.codes + (int64_t)index * side.code_bytes;
  if constexpr (side.bits == 16) {
    store_row<layout::DTYPE>(codes, x, layout::HEAD_DIM);
  } else {
    uint8_t scratch[layout::HEAD_DIM];
    encode(x, scratch, layout::HEAD_DIM, side.bits, side.groups, codes,
           page + side.meta + (int64_t)index * side.meta_bytes());
  }
}

template <int TIER, bool KEY>
INLINE void read_side(const uint8_t* page, int index, float* x) {
  constexpr Side side = KEY ? key_side(TIER) : value_side(TIER);
  const uint8_t* codes = page + side.codes + (int64_t)index * side.code_bytes;
  if constexpr (side.bits == 16) {
    load_row<layout::DTYPE>(codes, x, layout::HEAD_DIM);
  } else {
    uint8_t scratch[layout::HEAD_DIM];
    decode(codes, page + side.meta + (int64_t)index * side.meta_bytes(), layout::HEAD_DIM,
           side.bits, side.groups, scratch, x);
  }
}

// Write a vector of the model's dtype: 16-bit formats keep its bytes, and have no centres.
template <int TIER, bool KEY>
INLINE void write_vector(const Pool& pool, int64_t row, uint8_t* page, int index,
                         const uint8_t* vector) {
  constexpr Side side = KEY ? key_side(TIER) : value_side(TIER);
  if constexpr (side.bits == 16) {
    std::memcpy(page + side.codes + (int64_t)index * side.code_bytes, vector, ROW_BYTES);
  } else {
    float x[layout::HEAD_DIM];
    load_row<layout::DTYPE>(vector, x, layout::HEAD_DIM);
    if constexpr (KEY) pool.add_centre(row, -1.0f, x);
    write_side<TIER, KEY>(page, index, x);
  }
}

// Read a vector to the model's dtype, likewise.
template <int TIER, bool KEY>
INLINE void read_vector(const Pool& pool, int64_t row, const uint8_t* page, int index,
                        uint8_t* vector) {
  constexpr Side side = KEY ? key_side(TIER) : value_side(TIER);
  if constexpr (side.bits == 16) {
    std::memcpy(vector, page + side.codes + (int64_t)index * side.code_bytes, ROW_BYTES);
  } else {
    float x[layout::HEAD_DIM];
    read_side<TIER, KEY>(page, index, x);
    if constexpr (KEY) pool.add_centre(row, 1.0f, x);
    store_row<layout::DTYPE>(vector, x, layout::HEAD_DIM);
  }
}

template <int TIER>
INLINE void write_score(uint8_t* page, int index, float sum, int32_t position) {
  if constexpr (is_tracked(TIER)) {
    std::memcpy(page + layout::TIERS[TIER].sums + index * 4, &sum, 4);
    std::memcpy(page + layout::TIERS[TIER].positions + index * 4, &position, 4);
  }
}
