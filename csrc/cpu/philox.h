// Philox4x32-10 (Salmon et al., 2011), word 0 only, counter (id, position, 0, 0), for VL ids at
// once.
#pragma once
#include "cpu/lse.h"

namespace fastllm::FASTLLM_ISA {

// 64-bit lanes: a 32 x 32 -> 64 bit product per lane leaves both of its halves where they are
// needed.
typedef uint64_t vu __attribute__((vector_size(VL * 4)));

FASTLLM_INLINE vu vsetu(uint64_t x) { return x - vu{}; }
// Product of the low halves of the lanes.
FASTLLM_INLINE vu mul_low(vu a, vu b) {
#if defined(__AVX512F__)
  return (vu)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vu)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (vu)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

// What does not depend on the id: round keys, and the first two rounds' share of the position.
struct PhiloxRow {
  uint32_t k0[10], k1[10];
  uint32_t c0_after_first;           // position ^ k0[0]: the same for every id
  uint32_t low_second, high_second;  // of multiplier 0 times it
};
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;

static inline PhiloxRow philox_row(int64_t seed, int32_t position) {
  PhiloxRow row;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) row.k0[r] = k0, row.k1[r] = k1;
  row.c0_after_first = static_cast<uint32_t>(position) ^ row.k0[0];
  const uint64_t product = static_cast<uint64_t>(kPhiloxM0) * row.c0_after_first;
  row.low_second = static_cast<uint32_t>(product);
  row.high_second = static_cast<uint32_t>(product >> 32);
  return row;
}

// Word 0 in the low half of each lane; ids in the low halves.
FASTLLM_INLINE vu philox_lanes(const PhiloxRow& row, vu ids) {
  const vu m0 = vsetu(kPhiloxM0), m1 = vsetu(kPhiloxM1);
  // Round 0 has c2 = c3 = 0; in round 1 c0 is uniform and c1 = 0.
  vu p0 = mul_low(ids, m0);
  vu p1 = mul_low((p0 >> 32) ^ vsetu(row.k1[0]), m1);
  vu c0 = (p1 >> 32) ^ vsetu(row.k0[1]);
  vu c1 = p1;
  vu c2 = vsetu(row.high_second ^ row.k1[1]) ^ p0;
  vu c3 = vsetu(row.low_second);
#pragma GCC unroll 8
  for (int r = 2; r < 10; ++r) {
    p0 = mul_low(c0, m0);
    p1 = mul_low(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ vsetu(row.k0[r]);
    c2 = (p0 >> 32) ^ c3 ^ vsetu(row.k1[r]);
    c1 = p1;
    c3 = p0;
  }
  return c0;
}

// Words of ids first .. first + VL - 1, in order: even ids in one vector, odd ids in the other.
FASTLLM_INLINE vi philox_words(const PhiloxRow& row, int64_t first) {
  vu ids;
  for (int i = 0; i < VL / 2; ++i) ids[i] = static_cast<uint64_t>(first + 2 * i);
  const vu even = philox_lanes(row, ids), odd = philox_lanes(row, ids + 1);
  return reinterpret_cast<vi>((even & vsetu(0xffffffffu)) | (odd << 32));
}

// (word + 0.5) / 2^32 of unsigned words, rounded once or twice; conversions of 16-bit halves are
// exact.
FASTLLM_INLINE vf unit_interval(vi words) {
  const vf high = __builtin_convertvector((words >> 16) & 0xffff, vf);
  const vf low = __builtin_convertvector(words & 0xffff, vf);
  return (high * 65536.f + (low + 0.5f)) * 0x1p-32f;
}

// Gumbel noise -log(-log(u)). Near u = 1, where it is largest, u itself has no digits left in fp32:
// 1 - u comes from the complement of the word, and is exactly the -f of the logarithm's polynomial.
FASTLLM_INLINE vf gumbel_noise(vi words) {
  const vf u = unit_interval(words), one_minus_u = unit_interval(~words);
  const vf near_one = log_of_parts(-one_minus_u, vset(0.f));
  return -vlog(-(one_minus_u < vset(0.29f) ? near_one : vlog(u)));
}
// A cheap bound that the noise does not exceed: -log(-log(u)) <= -log(1 - u) <= -floor(log2(1 - u))
// ln2.
FASTLLM_INLINE vf gumbel_bound(vi words) {
  const vi exponent = (vbits(unit_interval(~words)) >> 23) - 127;
  return __builtin_convertvector(-exponent, vf) * 0.69315f;
}

}  // namespace fastllm::FASTLLM_ISA
