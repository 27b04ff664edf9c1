// The division of a call into tasks for the threads. Part of a SIMD level: see simd.h.
#pragma once

#include "gemm.h"

namespace attn {
namespace ATTN_LEVEL {

constexpr int64_t kMinCostPerThread = 1 << 16;  // in multiply-adds

// Runs task(t, scratch) for t in [0, n). cost: the work of a task, approximately in multiply-adds.
template <class Task>
void for_each_task(int64_t n, int64_t cost, const Task& task) {
  auto body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t t = begin; t < end; ++t) {
      Scratch& scratch = thread_scratch();
      ScratchScope scope(scratch);
      (*static_cast<const Task*>(context))(t, scratch);
    }
  };
  parallel_for(n, max(1, kMinCostPerThread / max(cost, 1)), body, const_cast<Task*>(&task));
}

// A stage of a call: `tasks` tasks per sentence, run(b, t, scratch), with about `cost` multiply-adds each.
template <class Run>
struct Stage {
  int64_t tasks, cost;
  Run run;
};
template <class Run>
Stage(int64_t, int64_t, Run) -> Stage<Run>;

// Runs dependent stages on all sentences. If every thread has a few sentences, it runs sentence by sentence, which
// reuses caches; otherwise stage by stage.
template <class... Stages>
void for_each_sentence(int64_t batch, const Stages&... stages) {
  if (batch < 4 * thread_count() && thread_count() > 1) {
    (for_each_task(batch * stages.tasks, stages.cost,
                   [&](int64_t t, Scratch& scratch) { stages.run(t / stages.tasks, t % stages.tasks, scratch); }),
     ...);
    return;
  }
  for_each_task(batch, ((stages.tasks * stages.cost) + ...), [&](int64_t b, Scratch& scratch) {
    auto tasks_of = [&](const auto& stage) {
      for (int64_t t = 0; t < stage.tasks; ++t) {
        ScratchScope scope(scratch);
        stage.run(b, t, scratch);
      }
    };
    (tasks_of(stages), ...);
  });
}

// The division of a sentence's queries into tasks. Tasks are small enough that weights and projected queries stay in L2
// and every thread gets a task. They are large enough that many queries share the work per step.
struct QueryTiles {
  int64_t queries, size, per_sentence, tasks;

  // queries: the number of rows of scores. Each query has `vectors` of them, and a tile has all of them if possible.
  QueryTiles(int64_t batch, int64_t queries, int64_t steps, bool per_query, int64_t vectors) : queries(queries) {
    constexpr int64_t kLeast = 4, kWeights = 1 << 17;
    size = min(kMaxQueries, max(kLeast, kWeights / max(steps, 1)));
    size = min(size, max(1, divide_up(batch * queries, thread_count())));
    if (1 < vectors && vectors <= kMaxQueries) size = max(1, size / vectors) * vectors;
    if (per_query)  // each query has its own list of steps
      for (size = min(vectors, kMaxQueries); vectors % size != 0;) --size;
    per_sentence = divide_up(queries, size);
    tasks = batch * per_sentence;
  }

  int64_t sentence(int64_t task) const { return task / per_sentence; }
  int64_t first(int64_t task) const { return task % per_sentence * size; }
  int64_t count(int64_t task) const { return min(size, queries - first(task)); }

  // Into how many parts each task is split if there are fewer tasks than threads. cost: the work of a task.
  int64_t parts(int64_t cost) const {
    return min(divide_up(thread_count(), max(tasks, 1)), max(1, cost / kMinCostPerThread));
  }
};

// Part `part` of `parts` of n elements, in whole groups of `group`.
struct Range {
  int64_t begin, end;

  Range(int64_t n, int64_t part, int64_t parts, int64_t group) {
    const int64_t size = divide_up(divide_up(n, parts), group) * group;
    begin = min(n, part * size);
    end = min(n, begin + size);
  }
};

}  // namespace ATTN_LEVEL
}  // namespace attn
