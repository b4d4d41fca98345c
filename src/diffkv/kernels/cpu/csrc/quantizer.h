// Quantise and dequantise one vector, bit for bit as `diffkv.reference.quantize` does.
//
// Always inlined: where bits, groups and dim are constants, their loops are compiled for them.
#pragma once

#include "constants.h"
#include "simd.h"

// NaN counts as 0; what float16 cannot hold saturates.
INLINE void saturate(float* x, int dim) {
  for (int j = 0; j < dim; j++) {
    float y = x[j];
    y = y == y ? y : 0.0f;
    y = y < FLOAT16_MAX ? y : FLOAT16_MAX;
    x[j] = y > -FLOAT16_MAX ? y : -FLOAT16_MAX;
  }
}

INLINE void min_max(const float* x, int num, float* least, float* most) {
  float low = x[0], high = x[0];
  int j = 0;
  if (num >= LANES) {
    Floats lows = load<Floats>(x), highs = lows;
    for (j = LANES; j + LANES <= num; j += LANES) {
      const Floats y = load<Floats>(x + j);
      lows = y < lows ? y : lows;
      highs = y > highs ? y : highs;
    }
    high = max_lane(highs);
    low = -max_lane(-lows);
  }
  for (; j < num; j++) {
    low = x[j] < low ? x[j] : low;
    high = x[j] > high ? x[j] : high;
  }
  *least = low + 0.0f;  // -0.0 becomes 0.0: equal values, equal bytes
  *most = high;
}

// Scale and zero, as they are stored.
struct Grid {
  float scale, zero;
};

// What is below MIN_SCALE, as the scale of a constant group, becomes MIN_SCALE.
INLINE float half_scale(float scale) {
  scale = scale > MIN_SCALE ? scale : MIN_SCALE;
  return from_half(to_half(scale < FLOAT16_MAX ? scale : FLOAT16_MAX));
}

INLINE float half_zero(float zero) {
  zero = zero > -FLOAT16_MAX ? zero : -FLOAT16_MAX;
  return from_half(to_half(zero < FLOAT16_MAX ? zero : FLOAT16_MAX));
}

// Moves the ends of a group inwards for 1 and 2 bits, unless a quarter of the elements is near
// them.
INLINE void cut_ends(const float* x, int num, int bits, float* least, float* most) {
  const float low = *least, high = *most, span = high - low, near = span * OUTER;
  int outer = 0;
  for (int j = 0; j < num; j++) outer += (x[j] - low < near) + (high - x[j] < near);
  if (4 * outer >= num) return;
  const int width = 31 - __builtin_clz(num);  // as a power of two
  const float cut = span * CUTS[bits - 1][width < CUT_WIDTHS ? width : CUT_WIDTHS - 1];
  *least = low + cut;
  *most = high - cut;
}

// The grid that gives a group back without bias, see `reference._unbiased`.
INLINE Grid unbiased(const float* x, const uint8_t* code, int num, Grid grid, float least,
                     float most) {
  const float span = most - least;
  if (!(span >= MIN_SCALE)) return grid;
  int32_t sum_x = 0, sum_c = 0, sum_xx = 0, sum_xc = 0;
  for (int j = 0; j < num; j++) {
    const int32_t part = (int32_t)((x[j] - least) / span * STEPS + 0.5f), c = code[j];
    sum_x += part;
    sum_c += c;
    sum_xx += part * part;
    sum_xc += part * c;
  }
  const int64_t variance = (int64_t)num * sum_xx - (int64_t)sum_x * sum_x;
  const int64_t covariance = (int64_t)num * sum_xc - (int64_t)sum_x * sum_c;
  if (covariance <= 0) return grid;
  const float step = span / STEPS;
  grid.scale = half_scale(step * ((float)variance / (float)covariance));
  const float mean = least + step * ((float)sum_x / (float)num);
  grid.zero = half_zero(mean - grid.scale * ((float)sum_c / (float)num));
  return grid;
}

// x [dim] is overwritten; scratch [dim]; codes [dim * bits / 8]; meta [groups, 2] float16.
INLINE void encode(float* x, uint8_t* scratch, int dim, int bits, int groups, uint8_t* codes,
                   uint8_t* meta) {
  const int width = dim / groups;
  const float levels = (float)((1 << bits) - 1);
  saturate(x, dim);
  for (int g = 0; g < groups; g++) {
    float* group = x + g * width;
    uint8_t* code_of = scratch + g * width;
    float least, most;
    min_max(group, width, &least, &most);
    float from = least, to = most;
    if (bits <= 2) cut_ends(group, width, bits, &from, &to);
    Grid grid = {half_scale((to - from) / levels), half_zero(from)};
    for (int j = 0; j < width; j++) {
      // Truncation is the floor, because what is below 0 becomes 0 first.
      float code = (group[j] - grid.zero) / grid.scale + 0.5f;
      code = code > 0.0f ? code : 0.0f;
      code = code < levels ? code : levels;
      code_of[j] = (uint8_t)(int32_t)code;
    }
    if (bits <= STRETCHED_BITS) grid = unbiased(group, code_of, width, grid, least, most);
    const uint16_t stored[2] = {to_half(grid.scale), to_half(grid.zero)};
    std::memcpy(meta + g * 4, stored, 4);
  }
  const int planes = 8 / bits, code_bytes = dim / planes;
  if (planes == 1) {
    std::memcpy(codes, scratch, code_bytes);
    return;
  }
  for (int b = 0; b < code_bytes; b++) codes[b] = scratch[b];
  for (int p = 1; p < planes; p++)
    for (int b = 0; b < code_bytes; b++)
      codes[b] |= (uint8_t)(scratch[p * code_bytes + b] << (p * bits));
}

// x [dim] = code * scale + zero, rounded after each step as torch does.
INLINE void decode(const uint8_t* codes, const uint8_t* meta, int dim, int bits, int groups,
                   uint8_t* scratch, float* x) {
  const int planes = 8 / bits, code_bytes = dim / planes, width = dim / groups;
  const int mask = (1 << bits) - 1;
  for (int p = 0; p < planes; p++)
    for (int b = 0; b < code_bytes; b++)
      scratch[p * code_bytes + b] = (uint8_t)(codes[b] >> (p * bits) & mask);
  for (int g = 0; g < groups; g++) {
    uint16_t stored[2];
    std::memcpy(stored, meta + g * 4, 4);
    const float scale = from_half(stored[0]), zero = from_half(stored[1]);
    for (int j = g * width; j < (g + 1) * width; j++) x[j] = (float)scratch[j] * scale + zero;
  }
}
