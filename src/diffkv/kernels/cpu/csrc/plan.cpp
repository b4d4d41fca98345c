// plan_decode and append. Same contract as `diffkv.reference.decode`.

#include <limits>
#include <vector>

#include "pool.h"

// Plans wait for memory: what -O3 adds is half of the time that this file takes to compile.
#pragma GCC optimize("O2")

namespace {

constexpr int64_t SERIAL_HEADS = 32;  // fewer heads than this are not worth waking threads for

struct Place {
  int32_t page, index;
};

constexpr Place NOWHERE = {-1, -1};

// The candidate with the smallest mean.
struct Least {
  float mean;
  Place place;
};

struct Decision {
  bool wants_page;
  int grows;     // the tier that gains a token, or -1
  Place victim;  // in the high tier: the new token's place, unless the high tier grows
  Place low;     // the demoted token's place, unless the low tier grows
};

// Of a tier that is tracked.
template <int TIER>
Least least_mean(const Pool& pool, int64_t row, int32_t num_tokens, int32_t prompt_len) {
  constexpr int T = tokens_per_page(TIER);
  const int32_t kept = pool.tokens(row, TIER);
  const Ints last_candidate = broadcast((int32_t)(num_tokens - pool.window));
  const Ints prompt = broadcast(prompt_len), scored = prompt - layout::SCORED_QUERIES;
  const float infinity = std::numeric_limits<float>::infinity();
  Floats best = broadcast(infinity);
  Ints best_position = broadcast(0), best_token = broadcast(-1);

  for (int32_t start = 0; start < kept; start += T) {
    const uint8_t* page = pool.page(pool.entry(row, TIER, start / T));
    const uint8_t* sums_at = page + layout::TIERS[TIER].sums;
    const uint8_t* positions_at = page + layout::TIERS[TIER].positions;
    const int num = kept - start < T ? kept - start : T;
    for (int i = 0; i < num; i += LANES) {
      Floats sums{};
      Ints positions{};
      if (i + LANES <= num) {
        sums = load<Floats>(sums_at + i * 4);
        positions = load<Ints>(positions_at + i * 4);
      } else {
        std::memcpy(&sums, sums_at + i * 4, (num - i) * 4);
        std::memcpy(&positions, positions_at + i * 4, (num - i) * 4);
      }
      const Ints clipped = positions > scored ? positions : scored;
      const Ints first = positions < prompt ? clipped : positions;
      const Floats mean = sums / to_floats(num_tokens - first);
      const Ints candidate = (positions <= last_candidate) & (i + iota() < num);
      const Ints better =
          candidate & ((mean < best) | ((mean == best) & (positions < best_position)));
      best = better ? mean : best;
      best_position = better ? positions : best_position;
      best_token = better ? start + i + iota() : best_token;
    }
  }

  int lane = 0;
  for (int l = 1; l < LANES; l++)
    if (best_token[l] >= 0 && (best_token[lane] < 0 || best[l] < best[lane] ||
                               (best[l] == best[lane] && best_position[l] < best_position[lane])))
      lane = l;
  const int32_t token = best_token[lane];
  if (token < 0) return {infinity, NOWHERE};
  return {best[lane], {pool.entry(row, TIER, token / T), token % T}};
}

float threshold(float alpha, int32_t num_tokens) {
  float t = alpha / (float)(num_tokens > 1 ? num_tokens : 1);
  t = t < 0.0f ? 0.0f : t;
  return t > 1.0f ? 1.0f : t;
}

bool is_full(const Pool& pool, int64_t row, int tier) {
  return pool.tokens(row, tier) ==
         (int64_t)pool.held(row, tier) * layout::TIERS[tier].tokens_per_page;
}

Decision decide(const Pool& pool, int64_t slot, int64_t row, int32_t num_tokens) {
  const float high = threshold(pool.thresholds[slot * 2], num_tokens);
  const float low = threshold(pool.thresholds[slot * 2 + 1], num_tokens);
  constexpr bool HAS_LOW = NUM_TIERS > 1;
  // Sums are never negative, so without thresholds no mean is below one.
  Least least_high = {std::numeric_limits<float>::infinity(), NOWHERE};
  Least least_low = least_high;
  const bool may_act = is_tracked(HIGH) && (high > 0.0f || low > 0.0f);
  if (may_act) least_high = least_mean<HIGH>(pool, row, num_tokens, pool.prompt_lens[slot]);
  const bool may_drop = least_high.mean < low;
  const bool may_demote = HAS_LOW && least_high.mean < high;
  if constexpr (HAS_LOW && is_tracked(NUM_TIERS - 1))
    if (may_drop || may_demote)
      least_low = least_mean<LOW>(pool, row, num_tokens, pool.prompt_lens[slot]);
  if (may_drop && least_high.mean < least_low.mean) return {false, -1, least_high.place, NOWHERE};
  if (may_demote && least_low.mean < low) return {false, -1, least_high.place, least_low.place};
  if constexpr (HAS_LOW)
    if (may_demote) return {is_full(pool, row, LOW), LOW, least_high.place, NOWHERE};
  return {is_full(pool, row, HIGH), HIGH, NOWHERE, NOWHERE};
}

// Count one more token of a tier, with a new page, and a leaf for it, if they were taken.
Place grow(const Pool& pool, int64_t row, int tier, int32_t page, int32_t leaf) {
  if (page >= 0) pool.enter(row, tier, page, leaf);
  const int T = layout::TIERS[tier].tokens_per_page;
  const int32_t number = pool.tokens(row, tier)++;
  return {pool.entry(row, tier, number / T), number % T};
}

}  // namespace

// places: [R, layers, heads, 4].
EXPORT int diffkv_plan_decode(const Pool* pool_ptr, const int32_t* slots, const int32_t* seq_lens,
                              int64_t num_requests, int32_t* places, int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t per_request = pool.num_layers * pool.num_kv_heads;
  const int64_t num = num_requests * per_request;
  std::vector<Decision> decisions(num);
  std::vector<int64_t> ring_index(num), leaf_index(num);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (num >= SERIAL_HEADS)
  for (int64_t i = 0; i < num; i++) {
    const int64_t r = i / per_request, slot = slots[r];
    if (slot >= 0)
      decisions[i] = decide(pool, slot, slot * per_request + i % per_request, seq_lens[r] - 1);
  }

  const int64_t head = pool.ring_ends[0];
  int64_t next = head, next_leaf = pool.leaf_ends[0], demotions = 0;
  bool table_full = false;
  for (int64_t i = 0; i < num; i++) {
    const int64_t slot = slots[i / per_request];
    ring_index[i] = next;
    leaf_index[i] = next_leaf;
    if (slot < 0) continue;
    demotions += decisions[i].grows == LOW || decisions[i].low.page >= 0;
    if (!decisions[i].wants_page) continue;
    const int64_t row = slot * per_request + i % per_request;
    next++;
    if (!pool.wants_leaf(row, decisions[i].grows)) continue;
    table_full |= pool.leaves_held(row) >= pool.directory_width;
    next_leaf++;
  }
  const bool overrun = next > pool.ring_ends[1];
  if (overrun) {
    ++*pool.overruns;
  } else if (table_full) {
    return TABLE_FULL;
  } else {
    pool.ring_ends[0] = next;
    pool.leaf_ends[0] = next_leaf;
    *pool.demotions += demotions;
  }

#pragma omp parallel for num_threads(threads) schedule(static) if (num >= SERIAL_HEADS)
  for (int64_t i = 0; i < num; i++) {
    const int64_t slot = slots[i / per_request];
    Place high = NOWHERE, low = NOWHERE;
    if (slot >= 0 && !overrun) {
      const Decision& decision = decisions[i];
      const int64_t row = slot * per_request + i % per_request;
      const int32_t page = decision.wants_page ? pool.ring(ring_index[i]) : -1;
      const int32_t leaf = pool.leaf_ring(leaf_index[i]);
      high = decision.grows == HIGH ? grow(pool, row, HIGH, page, leaf) : decision.victim;
      low = decision.low;
      if constexpr (NUM_TIERS > 1)
        if (decision.grows == LOW) low = grow(pool, row, LOW, page, leaf);
    }
    const int32_t place[4] = {high.page, high.index, low.page, low.index};
    std::memcpy(places + i * 4, place, sizeof(place));
  }
  return OK;
}

namespace {

// Requantise from the high place, without rounding to the model's dtype in between.
template <bool KEY>
INLINE void demote_side(const uint8_t* from, int from_index, uint8_t* to, int to_index) {
  float x[layout::HEAD_DIM];
  read_side<HIGH, KEY>(from, from_index, x);
  write_side<NUM_TIERS - 1, KEY>(to, to_index, x);
}

void demote(const uint8_t* from, int from_index, uint8_t* to, int to_index) {
  demote_side<true>(from, from_index, to, to_index);
  demote_side<false>(from, from_index, to, to_index);
  if constexpr (is_tracked(NUM_TIERS - 1)) {
    float sum;
    int32_t position;
    std::memcpy(&sum, from + layout::TIERS[HIGH].sums + from_index * 4, 4);
    std::memcpy(&position, from + layout::TIERS[HIGH].positions + from_index * 4, 4);
    write_score<NUM_TIERS - 1>(to, to_index, sum, position);
  }
}

}  // namespace

// places: [R, layers, heads, 4]; key, value: [R, heads, head_dim] with the given bytes per request.
EXPORT int diffkv_append(const Pool* pool_ptr, int64_t layer, const int32_t* slots,
                         const int32_t* positions, const int32_t* places, int64_t num_requests,
                         const uint8_t* key, int64_t key_stride, const uint8_t* value,
                         int64_t value_stride, int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t heads = pool.num_kv_heads, num = num_requests * heads;
#pragma omp parallel for num_threads(threads) schedule(static) if (num >= SERIAL_HEADS)
  for (int64_t i = 0; i < num; i++) {
    const int64_t r = i / heads, head = i % heads;
    int32_t place[4];
    std::memcpy(place, places + ((r * pool.num_layers + layer) * heads + head) * 4, sizeof(place));
    if (slots[r] < 0 || place[0] < 0) continue;
    uint8_t* page = pool.page(place[0]);
    if (place[2] >= 0) demote(page, place[1], pool.page(place[2]), place[3]);
    const int64_t row = pool.row(slots[r], layer, head), at = head * ROW_BYTES;
    write_vector<HIGH, true>(pool, row, page, place[1], key + r * key_stride + at);
    write_vector<HIGH, false>(pool, row, page, place[1], value + r * value_stride + at);
    write_score<HIGH>(page, place[1], 0.0f, positions[r]);
  }
  return OK;
}
