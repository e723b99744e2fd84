// Which instruction-set level runs: the best one at load, or the one that was asked for.
#include <string.h>

#include "fastmerge/cpu.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastmerge::cpu {

namespace baseline {
extern const KernelTable kTable;
}
#if defined(FASTMERGE_X86_LEVELS)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

namespace {

struct Level {
  const char* name;
  const KernelTable* table;
};

const Level kLevels[] = {
    {"baseline", &baseline::kTable},
#if defined(FASTMERGE_X86_LEVELS)
    {"avx2", &avx2::kTable},
    {"avx512", &avx512::kTable},
#endif
};

int detect() {
#if defined(FASTMERGE_X86_LEVELS)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  bool f16c = ecx & (1u << 29);
  bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : avx2 ? 2 : 1;
#else
  return 1;
#endif
}

const int kSupported = detect();
const Level* current = &kLevels[kSupported - 1];

}  // namespace

const KernelTable& kernels() { return *current->table; }

const char* isa() { return current->name; }

int supported_levels() { return kSupported; }

const char* level_name(int level) { return kLevels[level].name; }

bool set_isa(const char* name) {
  for (int level = 0; level < kSupported; ++level) {
    if (strcmp(name, kLevels[level].name) == 0) {
      current = &kLevels[level];
      return true;
    }
  }
  return false;
}

}  // namespace fastmerge::cpu
