// decide_rows: tiers of the tokens of complete rows. Same contract as `diffkv.reference.rows`.

#include <algorithm>
#include <cstdint>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int8_t HIGH = 0, LOW = 1, DROPPED = 2;

struct Candidate {
  float mean;
  int64_t token;
};

// Move the most significant low tokens up to where the last high page has room.
void fill_page(int8_t* tiers, const float* means, int64_t num, int page_tokens,
               std::vector<Candidate>& low) {
  const int64_t num_high = std::count(tiers, tiers + num, HIGH);
  const int64_t room = (page_tokens - num_high % page_tokens) % page_tokens;
  if (!room) return;
  low.clear();
  for (int64_t i = 0; i < num; i++)
    if (tiers[i] == LOW && means[i] >= 0) low.push_back({means[i], i});
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.mean > b.mean || (a.mean == b.mean && a.token < b.token);
  };
  const int64_t moves = std::min<int64_t>(room, (int64_t)low.size());
  std::nth_element(low.begin(), low.begin() + moves, low.end(), before);
  for (int64_t k = 0; k < moves; k++) tiers[low[k].token] = HIGH;
}

}  // namespace

// bounds: [R, 2], or null where tiers have been decided. sums, tiers: [num_heads, num_tokens].
EXPORT void diffkv_decide_rows(float* sums, const int32_t* cu_seqlens, int64_t num_rows,
                               const float* bounds, const int32_t* page_tokens, int64_t window,
                               int64_t scored, int64_t scored_by_rule, int8_t* tiers,
                               int64_t num_heads, int64_t num_tokens, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> means;
    std::vector<Candidate> low;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < num_rows * num_heads; each++) {
      const int64_t r = each / num_heads, start = cu_seqlens[r], num = cu_seqlens[r + 1] - start;
      const int64_t at = each % num_heads * num_tokens + start;
      means.resize(num);
      for (int64_t i = 0; i < num; i++) means[i] = sums[at + i] / (float)std::min(num - i, scored);
      if (bounds) {
        const float least_high = bounds[2 * r], least_low = bounds[2 * r + 1];
        for (int64_t i = 0; i < num; i++)
          tiers[at + i] = num - i <= window || means[i] >= least_high ? HIGH
                          : means[i] >= least_low                     ? LOW
                                                                      : DROPPED;
      }
      if (page_tokens[r]) fill_page(tiers + at, means.data(), num, page_tokens[r], low);
      if (scored != scored_by_rule)
        for (int64_t i = 0; i < num; i++)
          sums[at + i] = means[i] * (float)std::min(num - i, scored_by_rule);
    }
  }
}
