#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include "../ttaq_native.h"

namespace ttaq {

Parallel find_pool() {
  static const Parallel pool = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return pool;
}

void advise_huge_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  if (bytes < int64_t(2 * page)) return;
  const uintptr_t begin = (uintptr_t(start) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(start) + uintptr_t(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace ttaq

int ttaq_cpu_has_pool(void) { return ttaq::find_pool() != nullptr; }
