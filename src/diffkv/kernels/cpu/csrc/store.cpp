// store_prompt, gather, release. Same contract as `diffkv.reference.store`.

#include <algorithm>
#include <vector>

#include "pool.h"

namespace {

constexpr int BLOCK_TOKENS = 128;  // tokens that one thread stores or gathers at a time
constexpr int8_t DROPPED = 2;

// Neighbouring tokens of one request.
struct Span {
  int64_t slot, start, stop;
};

// Neighbouring places for tokens of one row, the first for its token `number`.
struct Block {
  int64_t slot, number, start, stop;
};

template <int TIER>
void write_token(const Pool& pool, int64_t row, int64_t number, const uint8_t* key,
                 const uint8_t* value, float sum, int32_t position) {
  constexpr int T = tokens_per_page(TIER);
  uint8_t* page = pool.page(pool.entry(row, TIER, number / T));
  const int index = (int)(number % T);
  write_vector<TIER, true>(pool, row, page, index, key);
  write_vector<TIER, false>(pool, row, page, index, value);
  write_score<TIER>(page, index, sum, position);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// key, value: [N, heads, head_dim] with the given bytes from token to token.
EXPORT int diffkv_store_prompt(const Pool* pool_ptr, int64_t layer, const int32_t* slots,
                               const int32_t* cu_seqlens, int64_t num_requests, const uint8_t* key,
                               int64_t key_stride, const uint8_t* value, int64_t value_stride,
                               const int32_t* positions, const int8_t* tiers, const float* sums,
                               int64_t num_tokens, int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t heads = pool.num_kv_heads;
  std::vector<Span> requests, blocks;
  std::vector<int64_t> first_block;
  for (int64_t r = 0; r < num_requests; r++) {
    if (slots[r] < 0) continue;
    first_block.push_back((int64_t)blocks.size());
    requests.push_back({slots[r], cu_seqlens[r], cu_seqlens[r + 1]});
    for (int64_t i = cu_seqlens[r]; i < cu_seqlens[r + 1]; i += BLOCK_TOKENS)
      blocks.push_back({slots[r], i, std::min<int64_t>(i + BLOCK_TOKENS, cu_seqlens[r + 1])});
  }
  first_block.push_back((int64_t)blocks.size());
  const int64_t R = (int64_t)requests.size(), B = (int64_t)blocks.size();

  // number[block][head][tier]: tokens in the block, then the number of its first one in the tier.
  std::vector<int64_t> number(B * heads * 2), wanted(R * heads * 2);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (int64_t b = 0; b < B; b++)
    for (int64_t head = 0; head < heads; head++)
      for (int64_t i = blocks[b].start; i < blocks[b].stop; i++) {
        const int8_t tier = tiers[head * num_tokens + i];
        if (tier >= 0 && tier < NUM_TIERS) number[(b * heads + head) * 2 + tier]++;
      }

  bool table_full = false;
  int64_t total = 0;
  for (int64_t r = 0; r < R; r++)
    for (int64_t head = 0; head < heads; head++) {
      const int64_t row = pool.row(requests[r].slot, layer, head);
      int64_t leaves = 0;
      for (int tier = 0; tier < 2; tier++) {
        int64_t next = pool.tokens(row, tier);
        for (int64_t b = first_block[r]; b < first_block[r + 1]; b++)
          next += std::exchange(number[(b * heads + head) * 2 + tier], next);
        if (tier < NUM_TIERS) {
          const int T = layout::TIERS[tier < NUM_TIERS ? tier : 0].tokens_per_page;
          wanted[(r * heads + head) * 2 + tier] = ceil_div(next, T) - pool.held(row, tier);
        }
        total += wanted[(r * heads + head) * 2 + tier];
        leaves += pool.leaves_of(pool.held(row, tier) + wanted[(r * heads + head) * 2 + tier]);
      }
      table_full |= leaves > pool.directory_width;
    }
  if (total > pool.ring_ends[1] - pool.ring_ends[0]) {
    ++*pool.overruns;
    return OK;
  }
  if (table_full) return TABLE_FULL;

  for (int64_t r = 0; r < R; r++)
    for (int64_t head = 0; head < heads; head++)
      for (int tier = 0; tier < NUM_TIERS; tier++) {
        const int64_t row = pool.row(requests[r].slot, layer, head);
        for (int64_t k = 0; k < wanted[(r * heads + head) * 2 + tier]; k++) {
          const int32_t leaf =
              pool.wants_leaf(row, tier) ? pool.leaf_ring(pool.leaf_ends[0]++) : -1;
          pool.enter(row, tier, pool.ring(pool.ring_ends[0]++), leaf);
        }
      }

#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < B; b++)
    for (int64_t head = 0; head < heads; head++) {
      const int64_t row = pool.row(blocks[b].slot, layer, head);
      int64_t* next = &number[(b * heads + head) * 2];
      for (int64_t i = blocks[b].start; i < blocks[b].stop; i++)
        with_tier(tiers[head * num_tokens + i], [&](auto tier) {
          write_token<tier.value>(pool, row, next[tier.value]++,
                                  key + i * key_stride + head * ROW_BYTES,
                                  value + i * value_stride + head * ROW_BYTES,
                                  sums[head * num_tokens + i], positions[i]);
        });
    }
  // `number` of a request's last block has moved past its last token.
  for (int64_t r = 0; r < R; r++)
    for (int64_t head = 0; head < heads && first_block[r] < first_block[r + 1]; head++)
      for (int tier = 0; tier < NUM_TIERS; tier++)
        pool.tokens(pool.row(requests[r].slot, layer, head), tier) =
            (int32_t)number[((first_block[r + 1] - 1) * heads + head) * 2 + tier];
  return OK;
}

// key, value: [N, heads, head_dim] with the given bytes from token to token; tiers: [heads, N].
EXPORT int diffkv_gather(const Pool* pool_ptr, int64_t layer, const int32_t* slots,
                         const int32_t* starts, int64_t num_rows, int64_t num_tokens, uint8_t* key,
                         int64_t key_stride, uint8_t* value, int64_t value_stride, int8_t* tiers,
                         int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t heads = pool.num_kv_heads;
  std::vector<Block> blocks;
  for (int64_t r = 0; r < num_rows; r++) {
    if (slots[r] < 0 || starts[r] < 0) return NEGATIVE;
    const int64_t stop = r + 1 < num_rows ? starts[r + 1] : num_tokens;
    for (int64_t head = 0; head < heads; head++) {
      const int64_t row = pool.row(slots[r], layer, head);
      if (pool.tokens(row, HIGH) + pool.tokens(row, LOW) > stop - starts[r]) return PLACE_TOO_SHORT;
    }
    for (int64_t i = starts[r]; i < stop; i += BLOCK_TOKENS)
      blocks.push_back({slots[r], i - starts[r], i, std::min<int64_t>(i + BLOCK_TOKENS, stop)});
  }
#pragma omp parallel for num_threads(threads) collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < (int64_t)blocks.size(); b++)
    for (int64_t head = 0; head < heads; head++) {
      const Block& block = blocks[b];
      const int64_t row = pool.row(block.slot, layer, head), num_high = pool.tokens(row, HIGH);
      const int64_t num = num_high + pool.tokens(row, LOW);
      for (int64_t at = block.start, i = block.number; at < block.stop; at++, i++) {
        uint8_t *k = key + at * key_stride + head * ROW_BYTES,
                *v = value + at * value_stride + head * ROW_BYTES;
        if (i >= num) {
          std::memset(k, 0, ROW_BYTES);
          std::memset(v, 0, ROW_BYTES);
          tiers[head * num_tokens + at] = DROPPED;
          continue;
        }
        with_tier(i < num_high ? HIGH : LOW, [&](auto tier) {
          constexpr int TIER = tier.value, T = tokens_per_page(TIER);
          const int64_t n = TIER == HIGH ? i : i - num_high;
          const uint8_t* page = pool.page(pool.entry(row, TIER, n / T));
          read_vector<TIER, true>(pool, row, page, (int)(n % T), k);
          read_vector<TIER, false>(pool, row, page, (int)(n % T), v);
          tiers[head * num_tokens + at] = (int8_t)TIER;
        });
      }
    }
  return OK;
}

EXPORT int diffkv_release(const Pool* pool_ptr, const int32_t* slots, int64_t num_requests,
                          int64_t layer, int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t first = layer < 0 ? 0 : layer, last = layer < 0 ? pool.num_layers : layer + 1;
  std::vector<int64_t> rows, starts, leaf_starts;
  int64_t tail = pool.ring_ends[1], leaf_tail = pool.leaf_ends[1];
  for (int64_t r = 0; r < num_requests; r++)
    for (int64_t each = first; each < last && slots[r] >= 0; each++)
      for (int64_t head = 0; head < pool.num_kv_heads; head++) {
        const int64_t row = pool.row(slots[r], each, head);
        rows.push_back(row);
        starts.push_back(tail);
        leaf_starts.push_back(leaf_tail);
        tail += pool.held(row, HIGH) + pool.held(row, LOW);
        leaf_tail += pool.leaves_held(row);
      }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < (int64_t)rows.size(); i++) {
    int64_t next = starts[i], next_leaf = leaf_starts[i];
    for (int tier = HIGH; tier <= LOW; tier++) {
      const int64_t held = pool.held(rows[i], tier);
      for (int64_t k = 0; k < held; k++) pool.ring(next++) = pool.entry(rows[i], tier, k);
      for (int64_t k = 0; k < pool.leaves_of(held); k++)
        pool.leaf_ring(next_leaf++) = std::exchange(pool.leaf(rows[i], tier, k), -1);
      pool.held(rows[i], tier) = 0;
      pool.tokens(rows[i], tier) = 0;
    }
  }
  pool.ring_ends[1] = tail;
  pool.leaf_ends[1] = leaf_tail;
  return OK;
}
