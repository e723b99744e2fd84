// How work is shared out: fixed blocks in contiguous runs per thread.
#pragma once

#include <stdint.h>

#include "fastmerge/cpu.h"

namespace fastmerge::cpu::FASTMERGE_LEVEL {

// Below this many elements a thread costs more than it saves.
constexpr int64_t kGrain = 32768;

inline int team_size(int64_t elements, int threads) {
  int64_t useful = elements / kGrain;
  if (useful < 1) return 1;
  return useful < threads ? int(useful) : threads;
}

// Calls body(begin, end) on runs of blocks that together cover [0, blocks).
template <class Body>
inline void parallel_runs(int64_t blocks, int team, Body body) {
  if (team <= 1) {
    body(int64_t(0), blocks);
    return;
  }
  // Sixteen runs a thread: long enough for the hardware prefetchers, short enough to even out a
  // thread that was held up.
  int64_t run = blocks / (int64_t(team) * 16);
  if (run < 1) run = 1;
  int64_t runs = (blocks + run - 1) / run;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t r = 0; r < runs; ++r) {
    int64_t begin = r * run;
    int64_t end = begin + run < blocks ? begin + run : blocks;
    body(begin, end);
  }
}

inline int64_t total_elements(const TensorList& tensors) {
  int64_t total = 0;
  for (int64_t t = 0; t < tensors.count; ++t) total += tensors.sizes[t];
  return total;
}

// The tensor that holds block b.
inline int64_t tensor_of(const TensorList& tensors, int64_t b) {
  int64_t low = 0, high = tensors.count;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (tensors.first_block[middle] <= b) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls body(tensor, block, begin, end) for every block of every tensor, where [begin, end) are
// elements of that tensor and `block` counts over all tensors.
template <class Body>
inline void for_each_block(const TensorList& tensors, int threads, Body body) {
  int64_t blocks = tensors.first_block[tensors.count];
  if (blocks == 0) return;
  int team = team_size(total_elements(tensors), threads);
  parallel_runs(blocks, team, [&](int64_t first, int64_t last) {
    int64_t t = tensor_of(tensors, first);
    for (int64_t b = first; b < last; ++b) {
      while (tensors.first_block[t + 1] <= b) ++t;
      int64_t begin = (b - tensors.first_block[t]) * kBlock;
      int64_t end = begin + kBlock < tensors.sizes[t] ? begin + kBlock : tensors.sizes[t];
      body(t, b, begin, end);
    }
  });
}

}  // namespace fastmerge::cpu::FASTMERGE_LEVEL
