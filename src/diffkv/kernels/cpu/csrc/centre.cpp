// centre_rows: the mean keys of complete rows. Same contract as `diffkv.reference.rows`.

#include <algorithm>

#include "pool.h"

namespace {

constexpr int COLUMNS = 4;  // slot, skipped tokens, row before, heir

// Sums in float64 do not show in what order keys are added.
void mean_of(const uint8_t* key, int64_t stride, int64_t num, uint16_t* centre) {
  double sums[layout::HEAD_DIM] = {};
  float x[layout::HEAD_DIM];
  for (int64_t i = 0; i < num; i++) {
    load_row<layout::DTYPE>(key + i * stride, x, layout::HEAD_DIM);
    for (int j = 0; j < layout::HEAD_DIM; j++) sums[j] += x[j];
  }
  for (int j = 0; j < layout::HEAD_DIM; j++) x[j] = (float)(sums[j] / std::max<int64_t>(num, 1));
  store_row<BFLOAT16>(centre, x, layout::HEAD_DIM);
}

}  // namespace

// rows: [num_rows, COLUMNS]. key: [N, heads, head_dim] with `key_stride` bytes from token to token.
EXPORT int diffkv_centre_rows(const Pool* pool_ptr, int64_t layer, const int32_t* rows,
                              const int32_t* cu_seqlens, int64_t num_rows, const uint8_t* key,
                              int64_t key_stride, int threads) {
  const Pool& pool = *pool_ptr;
  const int64_t heads = pool.num_kv_heads;
  constexpr int64_t CENTRE_BYTES = layout::HEAD_DIM * sizeof(uint16_t);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (int64_t r = 0; r < num_rows; r++)
    for (int64_t head = 0; head < heads; head++) {
      const int32_t *row = rows + r * COLUMNS, skipped = row[1], before = row[2], heir = row[3];
      const auto centre = [&](int64_t slot) {
        return pool.centres + pool.row(slot, layer, head) * layout::HEAD_DIM;
      };
      const int64_t first = cu_seqlens[r] + skipped;
      if (before >= 0)
        std::memcpy(centre(row[0]), centre(before), CENTRE_BYTES);
      else
        mean_of(key + first * key_stride + head * ROW_BYTES, key_stride, cu_seqlens[r + 1] - first,
                centre(row[0]));
      if (heir >= 0) std::memcpy(centre(heir), centre(row[0]), CENTRE_BYTES);
    }
  return OK;
}
