// How work is cut for torch's thread pool. A cut never changes a result: no sum crosses it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace metafast {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// body(begin, end) over 0..items, each item being about `work` multiply-adds.
template <class Body>
void parallel(int64_t items, int64_t work, const Body& body) {
  if (items <= 0) return;
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), body);
}

// What one task does in `items` independent pieces of about `work` multiply-adds each: body(task, item).
template <class Body>
struct Stage {
  int64_t items;
  int64_t work;
  Body body;
};
template <class Body>
Stage(int64_t, int64_t, Body) -> Stage<Body>;

// Runs the stages of every task in order. With enough tasks the threads share these, in one parallel region; else they
// share the items of each stage.
template <class... Bodies>
void parallel_stages(int64_t tasks, const Stage<Bodies>&... stages) {
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks >= 2 * threads) {
    parallel(tasks, ((stages.items * stages.work) + ...), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const auto run = [&](const auto& stage) {
          for (int64_t item = 0; item < stage.items; ++item) stage.body(task, item);
        };
        (run(stages), ...);
      }
    });
  } else {
    const auto run = [&](const auto& stage) {
      parallel(tasks * stage.items, stage.work, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) stage.body(k / stage.items, k % stage.items);
      });
    };
    (run(stages), ...);
  }
}

// Cuts `d` features of each of `tasks` tasks into chunks of whole vectors: few enough bytes of `rows` rows to stay in the
// first-level cache, and at least two items for every thread where the features allow it.
struct Chunks {
  int64_t size;
  int64_t count;

  Chunks(int64_t tasks, int64_t d, int64_t rows) {
    constexpr int64_t kVector = 16, kCacheFloats = 6144;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = tasks >= 2 * threads ? 1 : (2 * threads + tasks - 1) / std::max<int64_t>(1, tasks);
    int64_t width = std::min((d + wanted - 1) / wanted, kCacheFloats / std::max<int64_t>(1, rows));
    width = std::max<int64_t>(width, 4 * kVector);
    size = (std::min(width, d) + kVector - 1) / kVector * kVector;
    count = d == 0 ? 0 : (d + size - 1) / size;
  }
};

}  // namespace metafast
