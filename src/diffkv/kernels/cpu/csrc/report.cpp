// report. Same contract as `diffkv.reference.report`.

#include <algorithm>

#include "pool.h"

namespace {

constexpr int64_t SERIAL_HEADS = 1024;  // fewer heads than this are not worth waking threads for

// Pages that `count` tokens add to one tier of a row.
int64_t added(const Pool& pool, int64_t row, int tier, int64_t count) {
  const int64_t per_page = tokens_per_page(tier);
  const int64_t room = pool.held(row, tier) * per_page - pool.tokens(row, tier);
  return (std::max<int64_t>(count - room, 0) + per_page - 1) / per_page;
}

// Most pages that `more` tokens can add to a row: the worst split between tiers.
int64_t growth(const Pool& pool, int64_t row, int64_t more) {
  int64_t worst = added(pool, row, HIGH, more);
  if constexpr (NUM_TIERS > 1)
    for (int64_t high = 0; high < more; high++)
      worst = std::max(worst, added(pool, row, HIGH, high) + added(pool, row, LOW, more - high));
  return worst;
}

}  // namespace

// numbers: [1 + R, 3 + most].
EXPORT int diffkv_report(const Pool* pool_ptr, const int32_t* slots, int64_t num_rows, int64_t most,
                         int64_t* numbers, int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t columns = 3 + most, per_slot = pool.num_layers * pool.num_kv_heads;
  std::fill(numbers, numbers + (1 + num_rows) * columns, 0);
  numbers[0] = *pool.overruns;
  numbers[1] = pool.ring_ends[1] - pool.ring_ends[0];
  numbers[2] = *pool.demotions;
#pragma omp parallel for num_threads(threads) if (num_rows * per_slot >= SERIAL_HEADS)
  for (int64_t r = 0; r < num_rows; r++) {
    if (slots[r] < 0) continue;
    int64_t* of_row = numbers + (1 + r) * columns;
    for (int64_t row = slots[r] * per_slot; row < (slots[r] + 1) * per_slot; row++) {
      of_row[0] += pool.held(row, HIGH) + pool.held(row, LOW);
      of_row[1] += pool.tokens(row, HIGH);
      of_row[2] += pool.tokens(row, LOW);
      for (int64_t more = 1; more <= most; more++) of_row[2 + more] += growth(pool, row, more);
    }
  }
  return OK;
}
