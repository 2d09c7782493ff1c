// Which instruction sets this processor has.
#include "../ttaq_native.h"
#include "kernels.h"
#include "product.h"

namespace ttaq {

#if defined(__x86_64__)

static bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

static bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

const Kernels* kernels_of(int level) {
  static const bool v3 = has_v3(), v4 = has_v4();
  if (level == TTAQ_V4) return v4 ? &v4::kernels : nullptr;
  if (level == TTAQ_V3) return v3 ? &v3::kernels : nullptr;
  return level == TTAQ_BASE ? &base::kernels : nullptr;
}

const Products* products_of(int level) {
  static const bool vnni = has_v4() && __builtin_cpu_supports("avx512vnni");
  if (!kernels_of(level)) return nullptr;
  if (level == TTAQ_V4 && vnni) return &v4::products;
  return level == TTAQ_BASE ? &base::products : &v3::products;
}

static int product_level() {
  const Products* products = products_of(ttaq_cpu_level());
  if (products == &v4::products) return TTAQ_V4;
  return products == &v3::products ? TTAQ_V3 : TTAQ_BASE;
}

#else

const Kernels* kernels_of(int level) { return level == TTAQ_BASE ? &base::kernels : nullptr; }
const Products* products_of(int level) { return level == TTAQ_BASE ? &base::products : nullptr; }
static int product_level() { return TTAQ_BASE; }

#endif

}  // namespace ttaq

int ttaq_cpu_level(void) {
  int level = TTAQ_V4;
  while (!ttaq::kernels_of(level)) --level;
  return level;
}

int ttaq_cpu_product_level(void) { return ttaq::product_level(); }
