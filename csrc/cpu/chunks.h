// Many tensors as one list of equal chunks, so that one parallel region serves them all.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

namespace blocksched {

constexpr int64_t CHUNK = 8192;            // numbers; 4 arrays of them in float fit the L2 cache
constexpr int64_t THREAD_WORTH = 1 << 17;  // accesses for which another thread is worth waking

using Sums = std::array<double, 3>;  // sum |g p|, sum g^2, sum p^2

// A tensor's numbers, and how often each is read or written, which is what takes the time.
struct Extent {
  int64_t numel = 0, accesses = 0;
};

struct Chunk {
  int64_t tensor, begin, count;
  int64_t start, end;  // accesses before it, and with it
};

inline std::vector<Chunk> chunks_of(const std::vector<Extent>& extents) {
  std::vector<Chunk> chunks;
  int64_t start = 0;
  for (size_t i = 0; i < extents.size(); ++i) {
    for (int64_t begin = 0; begin < extents[i].numel; begin += CHUNK) {
      const int64_t count = std::min(CHUNK, extents[i].numel - begin);
      const int64_t end = start + count * extents[i].accesses;
      chunks.push_back({int64_t(i), begin, count, start, end});
      start = end;
    }
  }
  return chunks;
}

// Calls f(chunk) -> Sums for every chunk and adds them to sums [n_blocks, 3] at blocks[tensor],
// chunk by chunk in order, whichever thread did which. Threads get equal shares of the accesses,
// whatever the sizes of the tensors and what is done with them.
template <class F>
void over_chunks(const std::vector<Chunk>& chunks, const int64_t* blocks, double* sums,
                 int64_t n_blocks, const F& f) {
  std::vector<Sums> partials(chunks.size());
  const int64_t accesses = chunks.empty() ? 0 : chunks.back().end;
  torch::stable::parallel_for(0, accesses, THREAD_WORTH, [&](int64_t begin, int64_t end) {
    auto chunk = std::lower_bound(chunks.begin(), chunks.end(), begin,
                                  [](const Chunk& c, int64_t at) { return c.start < at; });
    for (; chunk != chunks.end() && chunk->start < end; ++chunk) {
      partials[chunk - chunks.begin()] = f(*chunk);
    }
  });
  for (size_t i = 0; i < chunks.size(); ++i) {
    const int64_t block = blocks[chunks[i].tensor];
    if (block < 0 || block >= n_blocks) continue;
    for (int k = 0; k < 3; ++k) sums[3 * block + k] += partials[i][k];
  }
}

}  // namespace blocksched
