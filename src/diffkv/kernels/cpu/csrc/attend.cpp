// attend: one pass over a KV head's pages serves its whole query group.
//
// A vector is code * scale + zero, so scale and zero stay outside the loops over elements:
//   score = k_scale * (q . codes) + k_zero * sum(q)
//   output = sum over tokens of (p * v_scale) * codes, plus sum over tokens of p * v_zero
// both per group of elements. Work is cut into items of a fixed number of pages, whatever the
// number of threads or requests, and merged in a fixed order: results are the same bit for bit.
//
// A request's items are those of its closed rows, then of its open one. What all keys have in
// common makes no difference to softmax, so scores are those of keys less the open row's centre: an
// item of a closed row is done when what the two centres differ by is added, and one of the open
// row lacks nothing, its sums neither.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <vector>

#include "floating.h"
#include "integer.h"

namespace {

constexpr int D = layout::HEAD_DIM;
constexpr int ITEM_TOKENS = 1024;  // tokens of a work item, rounded to whole pages
constexpr int MAX_BLOCK = 8;       // query heads that share one pass
constexpr int GROUP = layout::GROUP;
constexpr int PAGES_AHEAD = 8;  // of the sums
constexpr float LOG2_E = 1.44269504f;

constexpr int pages_per_item(int tier) {
  const int pages = ITEM_TOKENS / tokens_per_page(tier);
  return pages > 0 ? pages : 1;
}

// Scores of an item are kept for the sums; where there are none, those of a tile at a time.
constexpr int item_stride() {
  int most = 0;
  for (int tier = 0; tier < NUM_TIERS; tier++) {
    const int tokens = whole_vectors(pages_per_item(tier) * tokens_per_page(tier)) + LANES;
    most = is_tracked(tier) && tokens > most ? tokens : most;
  }
  return most;
}

constexpr int score_stride(int tier) {
  return is_tracked(tier) ? item_stride() : tile_tokens(tier);
}

struct Call {
  const Pool& pool;
  const uint8_t* query;
  int64_t query_stride;
  uint8_t* output;
  int64_t output_stride;
  float scale;    // of the scores, which are logarithms to base 2
  float* scores;  // [kept item or, for items that keep none, thread; group; item_stride]
  // Per item: [item, group] twice, [item, group, D].
  float *largest, *total, *partial;
  float* lse;  // [request, head, group]
};

template <int TIER, int G>
using Queries =
    std::conditional_t<integer_keys(TIER), IntegerQueries<TIER, G>, FloatQueries<TIER, G>>;

// Scores of a tile's tokens, to base 2: scores[h][token], -inf in the padding.
template <int TIER, int G, class Lines>
INLINE void score_tile(const Tile<TIER>& tile, int num, const Queries<TIER, G>& queries,
                       float scale, float* scores, Floats* most, const Lines& lines) {
  constexpr Side side = key_side(TIER);
  constexpr int GROUPS = num_groups(side);
  for (int start = 0; start < num; start += LANES) {
    lines.score_step(start);
    Floats dots[GROUPS][G], totals[G] = {};
    queries.dot(tile.keys + start, dots);
    each<GROUPS>([&](auto g) {
      if constexpr (side.bits == 16) {
        each<G>([&](auto h) { totals[h] = dots[g][h]; });
      } else {
        Floats k_scale, k_zero;
        load_meta<GROUPS>(tile.k_meta + start * side.meta_bytes(), g, &k_scale, &k_zero);
        each<G>(
            [&](auto h) { totals[h] += madd(k_scale, dots[g][h], k_zero * queries.sums[g][h]); });
      }
    });
    each<G>([&](auto h) {
      Floats x = totals[h] * scale;
      if (start + LANES > num) x = iota() < num - start ? x : broadcast(-INFINITE);
      store(scores + h.value * score_stride(TIER) + start, x);
      most[h] = maximum(most[h], x);
    });
  }
}

// Softmax weights of a tile from its scores, times each token's value scale; sums of p, p * zero.
template <int TIER, int G>
INLINE void weigh_tile(const Tile<TIER>& tile, int num, const float* scores, const float* largest,
                       const float* keep, Floats* total, float (*weights)[G][tile_tokens(TIER)],
                       Floats (*zeros)[num_groups(value_side(TIER))]) {
  constexpr Side side = value_side(TIER);
  constexpr int GROUPS = num_groups(side);
  each<G>([&](auto h) {
    total[h] *= keep[h];
    for (int g = 0; g < GROUPS; g++) zeros[h][g] *= keep[h];
  });
  for (int start = 0; start < num; start += LANES) {
    Floats p[G];
    each<G>([&](auto h) {
      p[h] = exp2(load<Floats>(scores + h.value * score_stride(TIER) + start) - largest[h]);
      total[h] += p[h];
    });
    each<GROUPS>([&](auto g) {
      Floats v_scale = broadcast(1.0f), v_zero{};
      if constexpr (side.bits != 16)
        load_meta<GROUPS>(tile.v_meta + start * side.meta_bytes(), g, &v_scale, &v_zero);
      each<G>([&](auto h) {
        store(weights[g][h] + start, p[h] * v_scale);
        zeros[h][g] = madd(p[h], v_zero, zeros[h][g]);
      });
    });
  }
}

// What the scores of an item of a closed row lack: query . (its centre - that of the open row).
template <int G>
INLINE void score_centre(const Call& call, const Item& item, const uint8_t* query, float* scores) {
  float apart[whole_vectors(D)] = {}, q[whole_vectors(D)] = {};
  call.pool.add_centre(item.row, 1.0f, apart);
  call.pool.add_centre(item.open, -1.0f, apart);
  for (int h = 0; h < G; h++) {
    load_row<layout::DTYPE>(query + h * ROW_BYTES, q, D);
    Floats sum{};
    for (int j = 0; j < D; j += LANES)
      sum = madd(load<Floats>(q + j), load<Floats>(apart + j), sum);
    scores[h] = sum_lanes(sum) * call.scale;
  }
}

// One item for G query heads from `first_head` of its group on; `kept_scores` is where its scores
// go if the tier is tracked. Flattened: a lambda that is called takes its vectors through memory.
template <int TIER, int G>
__attribute__((flatten)) void attend_item(const Call& call, const Item& item, int64_t number,
                                          int first_head, float* kept_scores, Ahead& ahead) {
  constexpr Side side = value_side(TIER);
  constexpr int GROUPS = num_groups(side), GROUP_WIDTH = D / GROUPS;
  const int64_t head = item.head * GROUP + first_head, at = number * GROUP + first_head;
  const uint8_t* query = call.query + item.request * call.query_stride + head * ROW_BYTES;
  const Queries<TIER, G> queries(query);
  alignas(LINE_BYTES) float out[G][D] = {}, weights[GROUPS][G][tile_tokens(TIER)];
  float largest[G], keep[G];
  Floats total[G] = {}, zeros[G][GROUPS] = {};
  for (float& x : largest) x = -INFINITE;
  constexpr bool KEEPS = is_tracked(TIER);
  alignas(LINE_BYTES) float tile_scores[KEEPS ? 1 : G * score_stride(TIER)];
  float* scores = tile_scores;
  if constexpr (KEEPS) scores = kept_scores + first_head * item_stride();
  const int scores_step = KEEPS && item.kept >= 0 ? tile_tokens(TIER) : 0;
  Tile<TIER> tile;
  constexpr int VALUE_BLOCKS =
      integer_values(TIER) ? integer_value_blocks(TIER, G) : float_value_blocks(TIER, G);
  Schedule<TIER, VALUE_BLOCKS> lines;

  for (int done = 0; done < item.num_tokens; done += tile_tokens(TIER), scores += scores_step) {
    const int num = std::min(tile_tokens(TIER), item.num_tokens - done);
    tile.find(call.pool, item, done, num);
    if (first_head == 0) ahead.take(lines.lines, lines.NUM);
    if (first_head != 0 && done == 0) std::fill_n(lines.lines, lines.NUM, tile.keys[0]);
    Floats most[G];
    each<G>([&](auto h) { most[h] = broadcast(largest[h]); });
    score_tile<TIER, G>(tile, num, queries, call.scale, scores, most, lines);
    for (int h = 0; h < G; h++) {
      const float tile_largest = max_lane(most[h]);
      // Equal infinities would give NaN; there is nothing to keep then.
      keep[h] = tile_largest == largest[h] ? 1.0f : std::exp2(largest[h] - tile_largest);
      largest[h] = tile_largest;
    }
    weigh_tile<TIER, G>(tile, num, scores, largest, keep, total, weights, zeros);
    if constexpr (integer_values(TIER))
      add_integer_values<TIER, G>(tile, num, weights, keep, out, lines);
    else
      add_float_values<TIER, G>(tile, num, weights, keep, out, lines);
  }

  float more[G] = {};
  if constexpr (layout::CENTRED)
    if (item.row != item.open) score_centre<G>(call, item, query, more);
  for (int h = 0; h < G; h++) {
    call.largest[at + h] = largest[h] + more[h];
    call.total[at + h] = sum_lanes(total[h]);
    for (int g = 0; g < GROUPS; g++) {
      const float zero = sum_lanes(zeros[h][g]);
      for (int j = g * GROUP_WIDTH; j < (g + 1) * GROUP_WIDTH; j++)
        call.partial[(at + h) * D + j] = out[h][j] + zero;
    }
  }
}

// Groups of more than MAX_BLOCK query heads are cut into blocks of nearly equal size.
template <int TIER>
void attend_group(const Call& call, const Item& item, int64_t number, float* scores, Ahead& ahead) {
  constexpr int BLOCKS = (GROUP + MAX_BLOCK - 1) / MAX_BLOCK;
  each<BLOCKS>([&](auto b) {
    constexpr int FIRST = GROUP * b / BLOCKS, SIZE = GROUP * (b + 1) / BLOCKS - FIRST;
    attend_item<TIER, SIZE>(call, item, number, FIRST, scores, ahead);
  });
}

// Merge the items [first, last) of one KV head, in order.
void merge(const Call& call, int64_t request, int64_t head, int64_t first, int64_t last) {
  for (int h = 0; h < GROUP; h++) {
    const int64_t q_head = head * GROUP + h;
    float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int64_t i = first; i < last; i++) {
      const float x = call.largest[i * GROUP + h];
      largest = x > largest ? x : largest;
    }
    float out[D] = {};
    for (int64_t i = first; i < last; i++) {
      const int64_t at = i * GROUP + h;
      const float share = std::exp2(call.largest[at] - largest);
      total += call.total[at] * share;
      const float* partial = call.partial + at * D;
      for (int j = 0; j < D; j += LANES) {
        const int count = std::min(LANES, D - j);
        const Floats x = load_floats(partial + j, count) * share;
        store_floats(out + j, load_floats(out + j, count) + x, count);
      }
    }
    for (int j = 0; j < D && first < last; j++) out[j] /= total;
    store_row<layout::DTYPE>(call.output + request * call.output_stride + q_head * ROW_BYTES, out,
                             D);
    call.lse[(request * call.pool.num_kv_heads + head) * GROUP + h] = largest + std::log2(total);
  }
}

// Every token's sum grows by the max over the group of its probability.
template <int TIER>
void add_sums(const Call& call, const Item& item) {
  constexpr int T = tokens_per_page(TIER), SUMS = layout::TIERS[TIER].sums;
  const Pool& pool = call.pool;
  const float* lse = call.lse + (item.request * pool.num_kv_heads + item.head) * GROUP;
  const float* scores = call.scores + item.kept * GROUP * item_stride();
  const int pages = (item.num_tokens + T - 1) / T;
  for (int i = 0; i < pages; i++) {
    const int ahead = std::min(i + PAGES_AHEAD, pages - 1),
              num = std::min(T, item.num_tokens - i * T);
    const uint8_t* later = pool.page(pool.entry(item.row, TIER, item.first_page + ahead)) + SUMS;
    for (int byte = 0; byte < T * 4; byte += LINE_BYTES) __builtin_prefetch(later + byte, 1);
    uint8_t* sums = pool.page(pool.entry(item.row, TIER, item.first_page + i)) + SUMS;
    for (int start = 0; start < num; start += LANES) {
      const float* from = scores + i * T + start;
      Floats most = load<Floats>(from) - lse[0];
      for (int h = 1; h < GROUP; h++)
        most = maximum(most, load<Floats>(from + (int64_t)h * item_stride()) - lse[h]);
      const int count = std::min(LANES, num - start);
      store_floats(sums + start * 4, load_floats(sums + start * 4, count) + exp2(most), count);
    }
  }
}

// All items of a call, and which of them keep their scores.
struct WorkList {
  std::vector<Item> items;      // by request, head, row and tier
  std::vector<int64_t> starts;  // of each request and head, and the end
  std::vector<int64_t> kept;    // items with sums

  void fill(const Pool& pool, int64_t layer, const int32_t* slots, int64_t num_requests) {
    items.clear();
    kept.clear();
    starts.assign(1, 0);
    for (int64_t r = 0; r < num_requests; r++)
      for (int64_t head = 0; head < pool.num_kv_heads; head++) {
        if (slots[r] >= 0) {
          const int64_t open = pool.row(slots[r], layer, head);
          const int32_t* chain = pool.chains + slots[r] * pool.chain_width;
          for (int32_t k = 0; k < pool.chain_lens[slots[r]]; k++)
            add_row(pool, {r, head, pool.row(chain[k], layer, head), open});
          add_row(pool, {r, head, open, open});
        }
        starts.push_back((int64_t)items.size());
      }
  }

 private:
  // Add the items of a row, which `item` names.
  void add_row(const Pool& pool, Item item) {
    for (int tier = 0; tier < NUM_TIERS; tier++) {
      const bool keeps = is_tracked(tier) && item.row == item.open;
      const int pages = pages_per_item(tier), num = pool.tokens(item.row, tier);
      const int item_tokens = pages * layout::TIERS[tier].tokens_per_page;
      item.tier = tier;
      item.first_page = 0;
      for (int done = 0; done < num; done += item_tokens, item.first_page += pages) {
        item.num_tokens = std::min(item_tokens, num - done);
        item.kept = keeps ? (int64_t)kept.size() : -1;
        if (keeps) kept.push_back((int64_t)items.size());
        items.push_back(item);
      }
    }
  }
};

// Memory of the calling thread that grows and is kept between calls.
struct Scratch {
  float* memory = nullptr;
  size_t capacity = 0;

  ~Scratch() { std::free(memory); }

  float* get(size_t num) {
    if (num > capacity) {
      std::free(memory);
      capacity = (num + num / 4 + 63) / 64 * 64;
      memory = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
      if (memory == nullptr) std::abort();
    }
    return memory;
  }
};

}  // namespace

// query, output: [R, heads * GROUP, head_dim] with the given bytes from request to request.
EXPORT int diffkv_attend(const Pool* pool_ptr, int64_t layer, const int32_t* slots,
                         int64_t num_requests, const uint8_t* query, int64_t query_stride,
                         uint8_t* output, int64_t output_stride, float scale, int threads) {
  static thread_local Scratch scratch;
  static thread_local WorkList work_list;
  const Pool& pool = *pool_ptr;
  const int64_t heads = pool.num_kv_heads;
  work_list.fill(pool, layer, slots, num_requests);
  const int64_t N = (int64_t)work_list.items.size(), num_heads = num_requests * heads;
  const int64_t num_kept = (int64_t)work_list.kept.size(), rows = N * GROUP;
  const int useful = (int)std::max<int64_t>(1, std::min<int64_t>(threads, std::max(N, num_heads)));
  const int64_t num_scores = (num_kept + useful) * GROUP * item_stride();
  float* memory = scratch.get(num_scores + rows * (2 + D) + num_heads * GROUP);
  float* scores = memory;
  float* partial = scores + num_scores;
  float* largest = partial + rows * D;
  const Call call = {pool,   query,   query_stride,   output,  output_stride,     scale * LOG2_E,
                     scores, largest, largest + rows, partial, largest + 2 * rows};
  const Item* work = work_list.items.data();
  const int64_t *bounds = work_list.starts.data(), *with_sums = work_list.kept.data();
  std::atomic<int64_t> taken{0}, seats{num_kept};
#pragma omp parallel num_threads(useful)
  {
    Ahead ahead(pool);
    const int64_t seat = seats++;
    int64_t i = taken++;
    if (i < N) {
      ahead.start(work[i]);
      const uint8_t* first[64];
      ahead.take(first, 64);
    }
    while (i < N) {
      // Known one item early, so that its first pages can be asked for.
      const int64_t next = taken++;
      ahead.follow(next < N ? work + next : nullptr);
      const int64_t place = work[i].kept >= 0 ? work[i].kept : seat;
      float* to = scores + place * GROUP * item_stride();
      with_tier(work[i].tier,
                [&](auto tier) { attend_group<tier.value>(call, work[i], i, to, ahead); });
      i = next;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_heads; i++)
      merge(call, i / heads, i % heads, bounds[i], bounds[i + 1]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_kept; i++) {
      const Item& item = work[with_sums[i]];
      with_tier(item.tier, [&](auto tier) {
        if constexpr (is_tracked(tier.value)) add_sums<tier.value>(call, item);
      });
    }
  }
  return OK;
}
