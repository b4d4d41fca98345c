// attend: one pass over a KV head's pages serves its whole query group.
//
// A vector is code * scale + zero, so scale and zero stay outside the loops over elements:
//   score = k_scale * (q . codes) + k_zero * sum(q)
//   output = sum over tokens of (p * v_scale) * codes, plus sum over tokens of p * v_zero
// both per group of elements. Work is cut into items of a fixed number of pages, whatever the
// number of threads or requests, and merged in a fixed order: results are the same bit for bit.

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

#include "codes.h"

namespace {

constexpr int D = layout::HEAD_DIM;
constexpr int ITEM_TOKENS = 512;  // tokens of a work item, rounded to whole pages
constexpr int MAX_BLOCK = 8;      // query heads that share one pass
constexpr int GROUP = layout::GROUP;
constexpr int LINE_BYTES = 64;  // of the machine's caches
constexpr float LOG2_E = 1.44269504f;

constexpr int pages_per_item(int tier) {
  const int pages = ITEM_TOKENS / tokens_per_page(tier);
  return pages > 0 ? pages : 1;
}

// Tokens of a page, rounded up to whole vectors.
constexpr int padded_tokens(int tier) {
  return (tokens_per_page(tier) + LANES - 1) / LANES * LANES;
}

constexpr int item_stride() {
  int most = 0;
  for (int tier = 0; tier < NUM_TIERS; tier++) {
    const int tokens = pages_per_item(tier) * padded_tokens(tier);
    most = tokens > most ? tokens : most;
  }
  return most;
}

// Neighbouring pages of one head and tier.
struct Item {
  int64_t request, head, row;
  int tier, first_page, num_tokens;
};

struct Call {
  const Pool& pool;
  const uint8_t* query;
  int64_t query_stride;
  uint8_t* output;
  int64_t output_stride;
  float scale;  // of the scores, which are logarithms to base 2
  // Per item: [item, group, item_stride], [item, group] twice, [item, group, D].
  float *scores, *largest, *total, *partial;
  float* lse;  // [request, head, group]
};

// Query vectors of a block in the order of a tier's key chunks, and their sums by group.
template <int TIER, int G>
struct Queries {
  static constexpr Side side = SIDE<TIER, true>;
  Floats chunks[num_chunks(side)][G];
  float sums[num_groups(side)][G];

  explicit Queries(const uint8_t* query) {
    std::memset(sums, 0, sizeof(sums));
    for (int h = 0; h < G; h++) {
      float q[D];
      load_row<layout::DTYPE>(query + h * ROW_BYTES, q, D);
      each<num_chunks(side)>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, true, c.value>;
        Floats x{};
        std::memcpy(&x, q + chunk.element, chunk.count * 4);
        chunks[c][h] = x;
        sums[chunk.group][h] += sum_lanes(x);
      });
    }
  }
};

// Ask for a part of the next page: all at once would fill the queue of misses.
template <int PART, int PARTS>
INLINE void prefetch(const uint8_t* page) {
  constexpr int LINES = (layout::PAGE_BYTES + LINE_BYTES - 1) / LINE_BYTES;
  for (int line = LINES * PART / PARTS; line < LINES * (PART + 1) / PARTS; line++)
    __builtin_prefetch(page + line * LINE_BYTES);
}

constexpr int tokens_at_once(int group) {
  const int tokens = group == 1 ? 8 : group <= 4 ? 4 : 2;
  return tokens < LANES ? tokens : LANES;
}

// Dot products of LANES tokens' key codes with G queries: sums[group, G, LANES], by lane.
template <int TIER, int G>
INLINE void dot_codes(const uint8_t* codes, int count, const Queries<TIER, G>& queries,
                      Floats (*sums)[G][LANES]) {
  constexpr const Side& side = SIDE<TIER, true>;
  constexpr int NUM = num_chunks(side), TOKENS = tokens_at_once(G);
  for (int t = 0; t < count; t += TOKENS) {
    const uint8_t* rows[TOKENS];
    each<TOKENS>(
        [&](auto i) { rows[i] = codes + (t + i < count ? t + i : count - 1) * side.code_bytes; });
    Floats dots[G][TOKENS] = {};
    each<NUM>([&](auto c) {
      constexpr const Chunk& chunk = CHUNK<TIER, true, c.value>;
      Floats k[TOKENS];
      each<TOKENS>([&](auto i) {
        k[i] = unpack<side.bits, chunk.shift, chunk.count>(rows[i] + chunk.byte);
      });
      each<G>([&](auto h) {
        const Floats q = queries.chunks[c][h];
        each<TOKENS>([&](auto i) { dots[h][i] = madd(q, k[i], dots[h][i]); });
      });
      constexpr int next_group = c + 1 < NUM ? chunk_of(side, c.value + 1).group : -1;
      if constexpr (next_group != chunk.group)
        each<G>([&](auto h) {
          each<TOKENS>([&](auto i) {
            sums[chunk.group][h][t + i] = dots[h][i];
            dots[h][i] = Floats{};
          });
        });
    });
  }
}

// Scores of a page's tokens, to base 2: scores[h][token], -inf in the padding.
template <int TIER, int G>
INLINE void score_page(const uint8_t* page, int num, const Queries<TIER, G>& queries, float scale,
                       float* scores, Floats* most) {
  constexpr const Side& side = SIDE<TIER, true>;
  constexpr int GROUPS = num_groups(side);
  Floats sums[GROUPS][G][LANES] = {};
  for (int start = 0; start < num; start += LANES) {
    const int count = num - start < LANES ? num - start : LANES;
    dot_codes<TIER, G>(page + side.codes + start * side.code_bytes, count, queries, sums);
    Floats totals[G] = {};
    for (int g = 0; g < GROUPS; g++) {
      Floats k_scale{}, k_zero{};
      if constexpr (side.bits != 16)
        load_meta<GROUPS>(page + side.meta + start * side.meta_bytes(), g, count, &k_scale,
                          &k_zero);
      each<G>([&](auto h) {
        const Floats dots = sum_rows(sums[g][h]);
        if constexpr (side.bits == 16)
          totals[h] = dots;
        else
          totals[h] += madd(k_scale, dots, k_zero * queries.sums[g][h]);
      });
    }
    const Floats minus_infinity = broadcast(-std::numeric_limits<float>::infinity());
    each<G>([&](auto h) {
      const Floats x = iota() < count ? totals[h] * scale : minus_infinity;
      store(scores + h.value * item_stride() + start, x);
      most[h] = maximum(most[h], x);
    });
  }
}

constexpr int chunks_at_once(int group, int num) {
  const int chunks = group == 1 ? 8 : group <= 8 ? (group <= 5 ? 16 / group : 2) : 1;
  return chunks < num ? chunks : num;
}

// out[h] = out[h] * keep[h] + sum over tokens of weights[group][h][token] * value codes.
template <int TIER, int G>
INLINE void add_values(const uint8_t* page, int num, const float (*weights)[G][padded_tokens(TIER)],
                       const float* keep, Floats (*out)[num_chunks(value_side(TIER))]) {
  constexpr const Side& side = SIDE<TIER, false>;
  constexpr int NUM = num_chunks(side), AT_ONCE = chunks_at_once(G, NUM);
  each<(NUM + AT_ONCE - 1) / AT_ONCE>([&](auto block) {
    constexpr int FIRST = block * AT_ONCE, WIDTH = NUM - FIRST < AT_ONCE ? NUM - FIRST : AT_ONCE;
    Floats sums[G][WIDTH];
    each<G>(
        [&](auto h) { each<WIDTH>([&](auto c) { sums[h][c] = out[h][FIRST + c] * keep[h]; }); });
    const uint8_t* codes = page + side.codes;
    for (int t = 0; t < num; t++, codes += side.code_bytes)
      each<WIDTH>([&](auto c) {
        constexpr const Chunk& chunk = CHUNK<TIER, false, FIRST + c.value>;
        const Floats v = unpack<side.bits, chunk.shift, chunk.count>(codes + chunk.byte);
        each<G>([&](auto h) {
          sums[h][c] = madd(broadcast(weights[chunk.group][h][t]), v, sums[h][c]);
        });
      });
    each<G>([&](auto h) { each<WIDTH>([&](auto c) { out[h][FIRST + c] = sums[h][c]; }); });
  });
}

// Softmax weights of a page from its scores, times each token's value scale; sums of p, p * zero.
template <int TIER, int G>
INLINE void weigh_page(const uint8_t* page, int num, const float* scores, const float* largest,
                       const float* keep, Floats* total, float (*weights)[G][padded_tokens(TIER)],
                       Floats (*zeros)[num_groups(value_side(TIER))]) {
  constexpr const Side& side = SIDE<TIER, false>;
  constexpr int GROUPS = num_groups(side);
  each<G>([&](auto h) {
    total[h] *= keep[h];
    for (int g = 0; g < GROUPS; g++) zeros[h][g] *= keep[h];
  });
  for (int start = 0; start < num; start += LANES) {
    const int count = num - start < LANES ? num - start : LANES;
    Floats p[G];
    each<G>([&](auto h) {
      p[h] = exp2(load<Floats>(scores + h.value * item_stride() + start) - largest[h]);
      total[h] += p[h];
    });
    for (int g = 0; g < GROUPS; g++) {
      Floats v_scale = broadcast(1.0f), v_zero{};
      if constexpr (side.bits != 16)
        load_meta<GROUPS>(page + side.meta + start * side.meta_bytes(), g, count, &v_scale,
                          &v_zero);
      each<G>([&](auto h) {
        store(weights[g][h] + start, p[h] * v_scale);
        zeros[h][g] = madd(p[h], v_zero, zeros[h][g]);
      });
    }
  }
}

// One item for G query heads from `first_head` of its group on.
template <int TIER, int G>
void attend_item(const Call& call, const Item& item, int64_t number, int first_head) {
  constexpr const Side& side = SIDE<TIER, false>;
  constexpr int T = tokens_per_page(TIER), NUM = num_chunks(side), GROUPS = num_groups(side);
  const Pool& pool = call.pool;
  const int64_t head = item.head * GROUP + first_head, at = number * GROUP + first_head;
  const Queries<TIER, G> queries(call.query + item.request * call.query_stride + head * ROW_BYTES);
  float largest[G], keep[G], weights[GROUPS][G][padded_tokens(TIER)];
  Floats total[G] = {}, zeros[G][GROUPS] = {}, out[G][NUM] = {};
  for (float& x : largest) x = -std::numeric_limits<float>::infinity();
  float* scores = call.scores + at * item_stride();

  for (int done = 0; done < item.num_tokens; done += T) {
    const int page_number = item.first_page + done / T;
    const uint8_t* page = pool.page(pool.entry(item.row, TIER, page_number));
    const int num = item.num_tokens - done < T ? item.num_tokens - done : T;
    const bool is_last = done + T >= item.num_tokens;
    const uint8_t* next = is_last ? page : pool.page(pool.entry(item.row, TIER, page_number + 1));
    prefetch<0, 2>(next);
    Floats most[G];
    each<G>([&](auto h) { most[h] = broadcast(largest[h]); });
    score_page<TIER, G>(page, num, queries, call.scale, scores, most);
    for (int h = 0; h < G; h++) {
      const float page_largest = max_lane(most[h]);
      // Equal infinities would give NaN; there is nothing to keep then.
      keep[h] = page_largest == largest[h] ? 1.0f : std::exp2(largest[h] - page_largest);
      largest[h] = page_largest;
    }
    prefetch<1, 2>(next);
    weigh_page<TIER, G>(page, num, scores, largest, keep, total, weights, zeros);
    add_values<TIER, G>(page, num, weights, keep, out);
    scores += padded_tokens(TIER);
  }

  each<G>([&](auto h) {
    call.largest[at + h] = largest[h];
    call.total[at + h] = sum_lanes(total[h]);
    float zero[GROUPS];
    for (int g = 0; g < GROUPS; g++) zero[g] = sum_lanes(zeros[h][g]);
    each<NUM>([&](auto c) {
      constexpr const Chunk& chunk = CHUNK<TIER, false, c.value>;
      const Floats x = out[h][c] + zero[chunk.group];
      std::memcpy(call.partial + (at + h) * D + chunk.element, &x, chunk.count * 4);
    });
  });
}

// Groups of more than MAX_BLOCK query heads are cut into blocks of nearly equal size.
template <int TIER>
void attend_group(const Call& call, const Item& item, int64_t number) {
  constexpr int BLOCKS = (GROUP + MAX_BLOCK - 1) / MAX_BLOCK;
  each<BLOCKS>([&](auto b) {
    constexpr int FIRST = GROUP * b / BLOCKS, SIZE = GROUP * (b + 1) / BLOCKS - FIRST;
    attend_item<TIER, SIZE>(call, item, number, FIRST);
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
      for (int j = 0; j < D; j++) out[j] += call.partial[at * D + j] * share;
    }
    for (int j = 0; j < D && first < last; j++) out[j] /= total;
    store_row<layout::DTYPE>(call.output + request * call.output_stride + q_head * ROW_BYTES, out,
                             D);
    call.lse[(request * call.pool.num_kv_heads + head) * GROUP + h] = largest + std::log2(total);
  }
}

// Every token's sum grows by the max over the group of its probability.
template <int TIER>
void add_sums(const Call& call, const Item& item, int64_t number) {
  constexpr int T = tokens_per_page(TIER);
  const float* lse = call.lse + (item.request * call.pool.num_kv_heads + item.head) * GROUP;
  for (int done = 0; done < item.num_tokens; done += T) {
    const int num = item.num_tokens - done < T ? item.num_tokens - done : T;
    uint8_t* page = call.pool.page(call.pool.entry(item.row, TIER, item.first_page + done / T));
    const int64_t offset = done / T * padded_tokens(TIER);
    for (int start = 0; start < num; start += LANES) {
      const float* scores = call.scores + number * GROUP * item_stride() + offset + start;
      Floats most = load<Floats>(scores) - lse[0];
      for (int h = 1; h < GROUP; h++)
        most = maximum(most, load<Floats>(scores + (int64_t)h * item_stride()) - lse[h]);
      const Floats p = exp2(most);
      uint8_t* sums = page + layout::TIERS[TIER].sums + start * 4;
      const int count = num - start < LANES ? num - start : LANES;
      if (count == LANES) {
        store(sums, load<Floats>(sums) + p);
      } else {
        Floats x{};
        std::memcpy(&x, sums, count * 4);
        x += p;
        std::memcpy(sums, &x, count * 4);
      }
    }
  }
}

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
  static thread_local std::vector<Item> items;
  static thread_local std::vector<int64_t> starts;
  const Pool& pool = *pool_ptr;
  const int64_t heads = pool.num_kv_heads;
  items.clear();
  starts.assign(1, 0);
  for (int64_t r = 0; r < num_requests; r++)
    for (int64_t head = 0; head < heads; head++) {
      for (int tier = 0; tier < NUM_TIERS && slots[r] >= 0; tier++) {
        const int64_t row = pool.row(slots[r], layer, head);
        const int pages = pages_per_item(tier), num = pool.tokens(row, tier);
        const int item_tokens = pages * layout::TIERS[tier].tokens_per_page;
        for (int done = 0, page = 0; done < num; done += item_tokens, page += pages)
          items.push_back({r, head, row, tier, page, std::min(item_tokens, num - done)});
      }
      starts.push_back((int64_t)items.size());
    }

  const int64_t N = (int64_t)items.size(), num_heads = num_requests * heads, rows = N * GROUP;
  float* memory = scratch.get(rows * (item_stride() + 2 + D) + num_heads * GROUP);
  float* scores = memory;
  float* partial = scores + rows * item_stride();
  float* largest = partial + rows * D;
  const Call call = {pool,   query,   query_stride,   output,  output_stride,     scale * LOG2_E,
                     scores, largest, largest + rows, partial, largest + 2 * rows};
  const Item* work = items.data();
  const int64_t* bounds = starts.data();
  const int useful = (int)std::max<int64_t>(1, std::min<int64_t>(threads, std::max(N, num_heads)));
#pragma omp parallel num_threads(useful)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N; i++)
      with_tier(work[i].tier, [&](auto tier) { attend_group<tier.value>(call, work[i], i); });
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_heads; i++)
      merge(call, i / heads, i % heads, bounds[i], bounds[i + 1]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; i++)
      with_tier(work[i].tier, [&](auto tier) { add_sums<tier.value>(call, work[i], i); });
  }
  return OK;
}
