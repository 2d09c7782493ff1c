// Threads and memory: torch's own thread pool, and huge pages for large outputs.
#pragma once

#include <stdint.h>

#include <atomic>

namespace ttaq {

using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// GOMP_parallel as torch loaded it into this process, or null. A pool of our own would fight with torch's for the
// same cores, and starting threads costs more than quantising a small tensor.
Parallel find_pool();

// Asks for huge pages behind a large output: faulting in 4 KiB pages costs three times what writing them does.
void advise_huge_pages(void* start, int64_t bytes);

// Calls body(first, last) on disjoint ranges that cover [0, tasks). Ranges depend on the number of threads, so a body
// may only write to places that belong to one task.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  const Parallel pool = threads > 1 && tasks > 1 ? find_pool() : nullptr;
  if (!pool) {
    if (tasks > 0) body(int64_t(0), tasks);
    return;
  }
  struct Job {
    const Body& body;
    int64_t tasks, spans;
    std::atomic<int64_t> next;
  } job{body, tasks, tasks < 8 * threads ? tasks : int64_t(8) * threads, {0}};
  pool(
      [](void* data) {
        Job& job = *static_cast<Job*>(data);
        for (int64_t span; (span = job.next.fetch_add(1)) < job.spans;)
          job.body(span * job.tasks / job.spans, (span + 1) * job.tasks / job.spans);
      },
      &job, unsigned(threads), 0);
}

}  // namespace ttaq
