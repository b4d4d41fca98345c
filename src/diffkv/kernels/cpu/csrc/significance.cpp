// significance: attention of the last queries to every token, without keeping the score matrix.
//
// Two passes over items of a fixed number of tokens, each a small matrix product of a KV head's
// keys with all scored queries of its group: the first finds every query's log-sum-exp, the second
// adds up the probabilities of those tokens whose sums are asked for. Where attention has found the
// log-sum-exps, there is no first pass. Items are merged in a fixed order, so results do not depend
// on threads.

#include <algorithm>
#include <limits>
#include <vector>

#include "amx.h"
#include "element.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int ITEM_TOKENS = 128;
constexpr int TILE = 2 * LANES;  // tokens of one tile of the product
constexpr int TILE_QUERIES = 8;  // with TILE, as many accumulators as registers allow
constexpr float LOG2_E = 1.44269504f;

struct Request {
  int64_t first_query, first_token, num_tokens,
      first_row;                  // rows: [request, kv head, group, query]
  int64_t num_before, first_sum;  // tokens without a sum, and where the sums of the others are
  int num_queries;
};

struct Item {
  int64_t request, head, start, first_partial;
  int num_tokens;
};

struct Call {
  const uint8_t *query, *key;
  int64_t query_stride, key_stride;
  int dim, group;
  float scale;
  const float* lse;  // [q heads, lse_stride], natural logarithms; null: to be found
  int64_t lse_stride;
  bool by_tiles;
};

// Memory of one thread.
struct Buffers {
  std::vector<float> queries, rows, tile, scores;
  std::vector<uint16_t> raw_queries;  // [rows, dim] bfloat16
  std::vector<uint32_t> raw_keys;     // [ITEM_TOKENS / SIDE, dim / DEPTH] tiles

  Buffers(int dim, int num_rows, bool by_tiles)
      : queries(by_tiles ? 0 : (size_t)num_rows * dim),
        rows((size_t)TILE * dim),
        tile((size_t)TILE * dim),
        scores((size_t)num_rows * ITEM_TOKENS),
        raw_queries(by_tiles ? (size_t)num_rows * dim : 0),
        raw_keys(by_tiles ? (size_t)ITEM_TOKENS * dim / 2 : 0) {}
};

// scores[q][t] += queries[q] . tile[., t] for NUM queries and the tokens of a tile.
template <int NUM>
void multiply(const float* queries, const float* tile, int dim, float scale, float* scores) {
  Floats sums[NUM][2] = {};
  for (int d = 0; d < dim; d++) {
    const Floats low = load<Floats>(tile + d * TILE), high = load<Floats>(tile + d * TILE + LANES);
    each<NUM>([&](auto q) {
      const Floats x = broadcast(queries[q.value * dim + d]);
      sums[q][0] = madd(x, low, sums[q][0]);
      sums[q][1] = madd(x, high, sums[q][1]);
    });
  }
  each<NUM>([&](auto q) {
    store(scores + q.value * ITEM_TOKENS, sums[q][0] * scale);
    store(scores + q.value * ITEM_TOKENS + LANES, sums[q][1] * scale);
  });
}

const uint8_t* query_of(const Call& call, const Request& request, const Item& item, int row,
                        int element) {
  const int Q = request.num_queries;
  return call.query + (request.first_query + row % Q) * call.query_stride +
         (item.head * call.group + row / Q) * call.dim * element;
}

// Of a token of the item, or of its last one.
const uint8_t* key_of(const Call& call, const Request& request, const Item& item, int t,
                      int element) {
  const int64_t token = request.first_token + item.start + std::min(t, item.num_tokens - 1);
  return call.key + token * call.key_stride + item.head * call.dim * element;
}

#if defined(DIFFKV_AMX)
// Products of a bfloat16 model's queries and keys, which are the elements of tiles as they are.
void multiply_item(const Call& call, const Request& request, const Item& item, Buffers& buffers) {
  const int dim = call.dim, depth = dim / DEPTH, num_rows = call.group * request.num_queries;
  for (int row = 0; row < num_rows; row++)
    std::memcpy(&buffers.raw_queries[(size_t)row * dim], query_of(call, request, item, row, 2),
                2 * dim);
  const int num_tiles = (item.num_tokens + SIDE - 1) / SIDE;
  for (int tile = 0; tile < num_tiles; tile++)
    for (int k = 0; k < depth; k++) {
      const uint32_t* rows[SIDE];
      for (int t = 0; t < SIDE; t++)
        rows[t] = (const uint32_t*)key_of(call, request, item, tile * SIDE + t, 2) + k * SIDE;
      transpose(rows, &buffers.raw_keys[(tile * depth + k) * SIDE * SIDE]);
    }
  for (int row = 0; row < num_rows; row += SIDE) {
    float* scores = &buffers.scores[(size_t)row * ITEM_TOKENS];
    for (int tile = 0; tile < num_tiles; tile += 2) {
      _tile_zero(0);
      _tile_zero(1);
      for (int k = 0; k < depth; k++) {
        const uint32_t* keys = &buffers.raw_keys[(tile * depth + k) * SIDE * SIDE];
        _tile_loadd(2, &buffers.raw_queries[(size_t)row * dim + k * DEPTH], 2 * dim);
        _tile_loadd(3, keys, 4 * SIDE);
        _tile_loadd(4, keys + depth * SIDE * SIDE, 4 * SIDE);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, scores + tile * SIDE, 4 * ITEM_TOKENS);
      _tile_stored(1, scores + (tile + 1) * SIDE, 4 * ITEM_TOKENS);
    }
    for (int i = 0; i < SIDE * ITEM_TOKENS; i += LANES)
      store(scores + i, load<Floats>(scores + i) * call.scale);
  }
}
#endif

// Likewise in float32, of models of any dtype.
template <int DTYPE>
void multiply_converted(const Call& call, const Request& request, const Item& item,
                        Buffers& buffers) {
  const int dim = call.dim, num_rows = call.group * request.num_queries;
  const int element = dtype_bytes(DTYPE);
  for (int row = 0; row < num_rows; row++)
    load_row<DTYPE>(query_of(call, request, item, row, element),
                    &buffers.queries[(size_t)row * dim], dim);
  for (int start = 0; start < item.num_tokens; start += TILE) {
    for (int t = 0; t < TILE; t++)
      load_row<DTYPE>(key_of(call, request, item, start + t, element),
                      &buffers.rows[(size_t)t * dim], dim);
    for (int t = 0; t < TILE; t++)
      for (int d = 0; d < dim; d++) buffers.tile[d * TILE + t] = buffers.rows[t * dim + d];
    int row = 0;
    for (; row + TILE_QUERIES <= num_rows; row += TILE_QUERIES)
      multiply<TILE_QUERIES>(&buffers.queries[(size_t)row * dim], buffers.tile.data(), dim,
                             call.scale, &buffers.scores[row * ITEM_TOKENS + start]);
    for (; row < num_rows; row++)
      multiply<1>(&buffers.queries[(size_t)row * dim], buffers.tile.data(), dim, call.scale,
                  &buffers.scores[row * ITEM_TOKENS + start]);
  }
}

// buffers.scores[group, query, ITEM_TOKENS] to base 2; -inf where a query does not see a token.
template <int DTYPE>
void score_item(const Call& call, const Request& request, const Item& item, Buffers& buffers) {
#if defined(DIFFKV_AMX)
  if (call.by_tiles)
    multiply_item(call, request, item, buffers);
  else
#endif
    multiply_converted<DTYPE>(call, request, item, buffers);
  const int Q = request.num_queries, num_rows = call.group * Q;
  const int64_t first_unseen = request.num_tokens - Q + 1;
  if (item.start + item.num_tokens <= first_unseen && item.num_tokens == ITEM_TOKENS) return;
  for (int row = 0; row < num_rows; row++)
    for (int t = 0; t < ITEM_TOKENS; t++)
      if (t >= item.num_tokens || item.start + t >= first_unseen + row % Q)
        buffers.scores[row * ITEM_TOKENS + t] = -std::numeric_limits<float>::infinity();
}

// Largest score of each row, and the sum of 2^(score - largest).
void reduce_item(int num_rows, const float* scores, float* largest, float* total) {
  for (int row = 0; row < num_rows; row++, scores += ITEM_TOKENS) {
    Floats most = load<Floats>(scores), sum{};
    for (int t = LANES; t < ITEM_TOKENS; t += LANES) most = maximum(most, load<Floats>(scores + t));
    largest[row] = max_lane(most);
    total[row] = 0.0f;
    if (largest[row] == -std::numeric_limits<float>::infinity()) continue;
    for (int t = 0; t < ITEM_TOKENS; t += LANES)
      sum += exp2(load<Floats>(scores + t) - largest[row]);
    total[row] = sum_lanes(sum);
  }
}

// sums[i] = max over the group of the sum over queries of the probability of the item's token i,
// counted from its first one with a sum.
void add_probabilities(const Call& call, const Request& request, const Item& item,
                       const float* scores, const float* lse, float* sums) {
  float most[ITEM_TOKENS] = {};
  for (int h = 0; h < call.group; h++)
    for (int t = 0; t < ITEM_TOKENS; t += LANES) {
      Floats sum{};
      for (int q = 0; q < request.num_queries; q++) {
        const int row = h * request.num_queries + q;
        sum += exp2(load<Floats>(scores + row * ITEM_TOKENS + t) - lse[row]);
      }
      store(most + t, maximum(sum, load<Floats>(most + t)));
    }
  const int first = (int)std::max<int64_t>(0, request.num_before - item.start);
  std::memcpy(sums, most + first, (item.num_tokens - first) * sizeof(float));
}

template <int DTYPE>
void run(const Call& call, const std::vector<Request>& requests, const std::vector<Item>& items,
         int num_rows, int64_t num_heads, int64_t num_sums, float* sums, int threads) {
  const int64_t N = (int64_t)items.size(), R = (int64_t)requests.size();
  int64_t num_lse = 0;
  for (const Request& request : requests) num_lse += num_heads * call.group * request.num_queries;
  const bool finds = call.lse == nullptr;
  const int64_t num_partial = N && finds ? items.back().first_partial + (int64_t)num_rows : 0;
  std::vector<float> largest(num_partial), total(num_partial), lse(num_lse);
#pragma omp parallel num_threads(threads)
  {
    Buffers buffers(call.dim, (num_rows + SIDE - 1) / SIDE * SIDE, call.by_tiles);
    const Tiles tiles(call.by_tiles);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < (finds ? N : 0); i++) {
      const Request& request = requests[items[i].request];
      score_item<DTYPE>(call, request, items[i], buffers);
      reduce_item(call.group * request.num_queries, buffers.scores.data(),
                  &largest[items[i].first_partial], &total[items[i].first_partial]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < R * num_heads; i++) {
      const Request& request = requests[i / num_heads];
      const int rows = call.group * request.num_queries;
      if (!finds) {
        for (int row = 0; row < rows; row++) {
          const int64_t q_head = i % num_heads * call.group + row / request.num_queries;
          const int64_t query = request.first_query + row % request.num_queries;
          lse[request.first_row + i % num_heads * rows + row] =
              call.lse[q_head * call.lse_stride + query] * LOG2_E;
        }
        continue;
      }
      const auto before = [&](const Item& item, int64_t key) {
        return item.request * num_heads + item.head < key;
      };
      const auto first = std::lower_bound(items.begin(), items.end(), i, before);
      const auto last = std::lower_bound(first, items.end(), i + 1, before);
      for (int row = 0; row < rows; row++) {
        float most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
        for (auto item = first; item != last; ++item)
          most = std::max(most, largest[item->first_partial + row]);
        for (auto item = first; item != last; ++item)
          sum += total[item->first_partial + row] *
                 std::exp2(largest[item->first_partial + row] - most);
        lse[request.first_row + i % num_heads * rows + row] = most + std::log2(sum);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N; i++) {
      const Request& request = requests[items[i].request];
      if (items[i].start + items[i].num_tokens <= request.num_before) continue;
      score_item<DTYPE>(call, request, items[i], buffers);
      const int rows = call.group * request.num_queries;
      add_probabilities(call, request, items[i], buffers.scores.data(),
                        lse.data() + request.first_row + items[i].head * rows,
                        sums + items[i].head * num_sums + request.first_sum +
                            std::max<int64_t>(0, items[i].start - request.num_before));
    }
  }
}

}  // namespace

// sums: [num_kv_heads, num_sums], every element of which is written.
EXPORT void diffkv_significance(const uint8_t* query, int64_t query_stride, const uint8_t* key,
                                int64_t key_stride, const int32_t* cu_seqlens_q,
                                const int32_t* cu_seqlens_k, const int32_t* cu_seqlens_own,
                                int64_t num_requests, int64_t num_sums, int64_t num_kv_heads,
                                int group, int dim, int dtype, float scale, int max_queries,
                                const float* lse, int64_t lse_stride, float* sums, int threads) {
  const bool by_tiles = dtype == BFLOAT16 && dim % DEPTH == 0 && may_use_tiles();
  const Call call = {query,          key, query_stride, key_stride, dim, group,
                     scale * LOG2_E, lse, lse_stride,   by_tiles};
  std::fill(sums, sums + num_kv_heads * num_sums, 0.0f);
  std::vector<Request> requests;
  std::vector<Item> items;
  int64_t first_row = 0, first_partial = 0;
  int num_rows = 0;
  for (int64_t r = 0; r < num_requests; r++) {
    const int64_t first_query = std::max(cu_seqlens_q[r], cu_seqlens_q[r + 1] - max_queries);
    const int num_queries = (int)(cu_seqlens_q[r + 1] - first_query), rows = group * num_queries;
    const int64_t num = cu_seqlens_k[r + 1] - cu_seqlens_k[r];
    const int64_t num_own = cu_seqlens_own[r + 1] - cu_seqlens_own[r];
    if (num_queries <= 0 || num_own <= 0) continue;
    for (int64_t head = 0; head < num_kv_heads; head++)
      for (int64_t start = 0; start < num; start += ITEM_TOKENS, first_partial += rows)
        items.push_back({(int64_t)requests.size(), head, start, first_partial,
                         (int)std::min<int64_t>(ITEM_TOKENS, num - start)});
    requests.push_back({first_query, cu_seqlens_k[r], num, first_row, num - num_own,
                        cu_seqlens_own[r], num_queries});
    first_row += num_kv_heads * rows;
    num_rows = std::max(num_rows, rows);
  }
  each<3>([&](auto each_dtype) {
    if (dtype == each_dtype.value)
      run<each_dtype.value>(call, requests, items, num_rows, num_kv_heads, num_sums, sums, threads);
  });
}
