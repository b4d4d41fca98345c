// How fast two threads read pages of a pool, in order and at random, with and without huge pages,
// and so many pages asked for ahead: what attention over such pages could reach at most.
//
//   g++ -O3 -march=native -fopenmp benchmarks/page_reads.cpp -o page_reads && ./page_reads 3328

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

constexpr size_t HUGE = 2 << 20, LINE = 64, TOTAL = 256 << 20;
constexpr int THREADS = 2, REPEATS = 5;

constexpr int FIRST_CACHE = 3, SECOND_CACHE = 2;

// Gigabytes a second of the fastest of some passes over all pages.
template <int CACHE>
double read(const uint8_t* memory, size_t page_bytes, const std::vector<int>& order, size_t ahead) {
  const size_t num = order.size();
  double fastest = 1e9;
  static volatile uint64_t sink;
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    const auto start = std::chrono::steady_clock::now();
    uint64_t sum = 0;
#pragma omp parallel for num_threads(THREADS) schedule(static) reduction(+ : sum)
    for (size_t i = 0; i < num; i++) {
      const uint8_t* page = memory + order[i] * page_bytes;
      const uint8_t* later = memory + order[std::min(i + ahead, num - 1)] * page_bytes;
      for (size_t at = 0; at < page_bytes; at += LINE) {
        if (ahead > 0) __builtin_prefetch(later + at, 0, CACHE);
        sum += *(const uint64_t*)(page + at);
      }
    }
    sink = sum;
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, elapsed.count());
  }
  return num * page_bytes / fastest / 1e9;
}

int main(int count, char** words) {
  const size_t page_bytes = count > 1 ? std::atol(words[1]) : 3328, num = TOTAL / page_bytes;
  std::vector<int> in_order(num), at_random;
  std::iota(in_order.begin(), in_order.end(), 0);
  at_random = in_order;
  std::shuffle(at_random.begin(), at_random.end(), std::mt19937(0));
  std::printf("pages of %zu bytes, %zu MiB, %d threads, GB/s\n", page_bytes, TOTAL >> 20, THREADS);
  for (const bool huge : {false, true}) {
    auto* memory = (uint8_t*)std::aligned_alloc(HUGE, TOTAL);
    madvise(memory, TOTAL, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::fill_n(memory, TOTAL, 1);
    for (const bool random : {false, true})
      for (const size_t ahead : {0, 1, 2, 4}) {
        const std::vector<int>& order = random ? at_random : in_order;
        std::printf("%5s memory pages, %s, %zu ahead: %5.1f", huge ? "2 MiB" : "4 KiB",
                    random ? "at random" : "in order", ahead,
                    read<FIRST_CACHE>(memory, page_bytes, order, ahead));
        if (ahead > 0)
          std::printf(", in the second cache %5.1f",
                      read<SECOND_CACHE>(memory, page_bytes, order, ahead));
        std::printf("\n");
      }
    std::free(memory);
  }
}
