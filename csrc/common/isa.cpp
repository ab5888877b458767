#include "common/isa.h"

#include <cpuid.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "ops.h"

namespace fastllm {
namespace {

struct Features {
  bool v2, v3, v4, vnni, bf16, vbmi;
};

uint64_t xgetbv() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// A level counts only if the processor has the instructions AND the system saves their registers:
// hypervisors have been seen to show AVX-512 in CPUID with its state masked in XCR0.
Features detect() {
  uint32_t a, b, c, d;
  Features f{};
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool sse42 = c & bit_SSE4_2, popcnt = c & bit_POPCNT, ssse3 = c & bit_SSSE3;
  const bool fma = c & bit_FMA, f16c = c & bit_F16C, osxsave = c & bit_OSXSAVE, avx = c & bit_AVX;
  f.v2 = sse42 && popcnt && ssse3;
  const uint64_t xcr0 = osxsave ? xgetbv() : 0;
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6;
  uint32_t b7 = 0, c7 = 0, a71 = 0;
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d) && a >= 1)
    __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  uint32_t ext_c = 0;
  __get_cpuid(0x80000001, &a, &b, &ext_c, &d);
  const bool lzcnt = ext_c & bit_LZCNT, bmi = (b7 & bit_BMI) && (b7 & bit_BMI2);
  f.v3 = f.v2 && ymm && avx && (b7 & bit_AVX2) && fma && f16c && bmi && lzcnt;
  const uint32_t v4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
  f.v4 = f.v3 && zmm && (b7 & v4) == v4;
  f.vnni = f.v4 && (c7 & bit_AVX512VNNI);
  f.bf16 = f.vnni && (a71 & bit_AVX512BF16);
  f.vbmi = f.v4 && (c7 & bit_AVX512VBMI);
  return f;
}

struct Level {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    const Features f = detect();
    return std::vector<Level>{{"generic", &generic::kernels, f.v2},
                              {"avx2", &avx2::kernels, f.v3},
                              {"avx512", &avx512::kernels, f.vnni},
                              // Only Cooper Lake has BF16 without VBMI: it runs the level below.
                              {"avx512_bf16", &avx512_bf16::kernels, f.bf16 && f.vbmi}};
  }();
  return all;
}

const Level* find(const std::string& name) {
  std::string supported;
  for (const Level& level : levels()) {
    if (!level.supported) continue;
    if (name == level.name) return &level;
    supported += supported.empty() ? level.name : std::string(", ") + level.name;
  }
  throw std::invalid_argument("ISA level '" + name +
                              "' does not run on this processor; it has: " + supported);
}

const Level* initial() {
  if (const char* forced = std::getenv("FASTLLM_ISA"); forced && *forced) return find(forced);
  const Level* best = nullptr;
  for (const Level& level : levels())
    if (level.supported) best = &level;
  if (!best) throw std::runtime_error("fastllm needs an x86-64-v2 processor (SSE4.2, POPCNT)");
  return best;
}

std::atomic<const Level*>& active() {
  static std::atomic<const Level*> level{initial()};
  return level;
}

}  // namespace

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed)->kernels; }
const char* active_isa() { return active().load(std::memory_order_relaxed)->name; }
void set_isa(const std::string& name) { active() = find(name); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.supported) names.emplace_back(level.name);
  return names;
}

std::string cpu_features() {
  const Features f = detect();
  std::string out;
  const auto add = [&](bool has, const char* name) {
    if (has) out += out.empty() ? name : std::string(" ") + name;
  };
  add(f.v2, "x86-64-v2");
  add(f.v3, "x86-64-v3");
  add(f.v4, "x86-64-v4");
  add(f.vnni, "avx512_vnni");
  add(f.bf16, "avx512_bf16");
  add(f.vbmi, "avx512_vbmi");
  return out;
}

}  // namespace fastllm
