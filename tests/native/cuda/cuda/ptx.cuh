// The twin of csrc/cuda/ptx.cuh: the same functions on the emulated device, with the fragment
// layouts that the PTX ISA documents for ldmatrix and mma.m16n8k16.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

namespace fastllm::cuda {

using std::fmaf;

struct Bf16 {};
struct Fp16 {};

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
float from_half(uint16_t bits);
template <>
inline float from_half<Bf16>(uint16_t bits) {
  return bits_of<float>(static_cast<uint32_t>(bits) << 16);
}
template <>
inline float from_half<Fp16>(uint16_t bits) {
  return static_cast<float>(bits_of<_Float16>(bits));
}
template <class T>
uint16_t to_half(float x);
template <>
inline uint16_t to_half<Bf16>(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <>
inline uint16_t to_half<Fp16>(float x) {
  return bits_of<uint16_t>(static_cast<_Float16>(x));
}

template <class V>
V& shared_at(uint32_t offset) {
  return *reinterpret_cast<V*>(emulated::shared(offset, sizeof(V)));
}
template <class V>
V load(const V* from) {
  emulated::check_read(from, sizeof(V));
  return *from;
}
template <class V>
V load_coherent(const V* from) {
  return load(from);
}
template <class V>
void store(V* to, V value) {
  emulated::check_write(to, sizeof(V));
  *to = value;
}
inline void block_barrier() { emulated::barrier(); }
inline void warp_barrier() {
  const uint32_t nothing = 0;
  emulated::with_warp(&nothing, 1, [](emulated::Warp&) {});
}

inline int32_t float_bits(float x) { return bits_of<int32_t>(x); }
inline float float_of_bits(int32_t x) { return bits_of<float>(x); }

inline void copy_16(uint32_t to, const void* from, bool keep) {
  emulated::copy(to, from, 16, keep);
}
inline void copy_4(uint32_t to, const void* from, bool keep) { emulated::copy(to, from, 4, keep); }
inline void copies_commit() { emulated::commit(); }
template <int kPending>
void copies_wait() {
  emulated::wait(kPending);
}

// "ldmatrix": rows of 8 16-bit elements; thread l gives the address of row l % 8 of matrix l / 8
// and receives, of each matrix, elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1), row and
// column exchanged with .trans. The 8 rows of a matrix must lie in 8 different groups of 4 banks:
// the hardware would otherwise read them one after another.
template <bool kTransposed>
void load_four(uint32_t (&r)[4], uint32_t offset) {
  const uint32_t* out = emulated::with_warp(&offset, 1, [](emulated::Warp& warp) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) banks |= 1u << (warp.in[matrix * 8 + row][0] / 16 % 8);
      REQUIRE(banks == 0xff, "ldmatrix with bank conflicts: groups %x", banks);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i) {
          int row = lane / 4, column = lane % 4 * 2 + i;
          if (kTransposed) std::swap(row, column);
          uint16_t element;
          std::memcpy(&element, emulated::shared(warp.in[matrix * 8 + row][0], 16) + 2 * column, 2);
          word |= static_cast<uint32_t>(element) << (16 * i);
        }
        warp.out[lane][matrix] = word;
      }
  });
  for (int i = 0; i < 4; ++i) r[i] = out[i];
}
inline void load_matrices(uint32_t (&r)[4], uint32_t offset) { load_four<false>(r, offset); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t offset) {
  load_four<true>(r, offset);
}

// "mma.m16n8k16": with group = lane / 4, i = lane % 4 and two elements (+ e) in each register,
//   A: register 0 (group, 2 i), 1 (group + 8, 2 i), 2 (group, 2 i + 8), 3 (group + 8, 2 i + 8)
//   B: register 0 (k = 2 i, n = group), 1 (k = 2 i + 8, n = group)
//   C: 0 (group, 2 i), 1 (group, 2 i + 1), 2 (group + 8, 2 i), 3 (group + 8, 2 i + 1)
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t in[10] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 4; ++i) in[6 + i] = bits_of<uint32_t>(d[i]);
  const uint32_t* out = emulated::with_warp(in, 10, [](emulated::Warp& warp) {
    ++emulated::device().products;
    const auto half = [](uint32_t word, int e) {
      return from_half<T>(static_cast<uint16_t>(word >> (16 * e)));
    };
    float a_matrix[16][16], b_matrix[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 2; ++e) {
        const int group = lane / 4, i = lane % 4 * 2 + e;
        for (int r = 0; r < 4; ++r)
          a_matrix[group + r % 2 * 8][i + r / 2 * 8] = half(warp.in[lane][r], e);
        for (int r = 0; r < 2; ++r) b_matrix[i + 8 * r][group] = half(warp.in[lane][4 + r], e);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int c = 0; c < 4; ++c) {
        const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        double sum = bits_of<float>(warp.in[lane][6 + c]);
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(a_matrix[row][k]) * b_matrix[k][column];
        warp.out[lane][c] = bits_of<uint32_t>(static_cast<float>(sum));
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = bits_of<float>(out[i]);
}

template <class T>
uint32_t pack(float low, float high) {
  return to_half<T>(low) | static_cast<uint32_t>(to_half<T>(high)) << 16;
}
template <class T>
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t difference = 0;
  for (int i = 0; i < 32; i += 16)
    difference |= static_cast<uint32_t>(to_half<T>(from_half<T>(static_cast<uint16_t>(a >> i)) -
                                                   from_half<T>(static_cast<uint16_t>(b >> i))))
                  << i;
  return difference;
}
template <class T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 32; i += 16)
    product |= static_cast<uint32_t>(to_half<T>(from_half<T>(static_cast<uint16_t>(a >> i)) *
                                                from_half<T>(static_cast<uint16_t>(b >> i))))
               << i;
  return product;
}
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(all >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }

template <class V, class From>
V exchange(V value, From from) {
  static_assert(sizeof(V) == 4);
  const uint32_t in = bits_of<uint32_t>(value);
  const uint32_t* out = emulated::with_warp(&in, 1, [&](emulated::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = warp.in[from(lane)][0];
  });
  return bits_of<V>(out[0]);
}
template <class V>
V from_lane(V value, int source) {  // each lane names its own
  static_assert(sizeof(V) == 4);
  const uint32_t in[2] = {bits_of<uint32_t>(value), static_cast<uint32_t>(source)};
  const uint32_t* out = emulated::with_warp(in, 2, [](emulated::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = warp.in[warp.in[lane][1] % 32][0];
  });
  return bits_of<V>(out[0]);
}
template <class V>
V from_lane_xor(V value, int mask) {
  return exchange(value, [mask](int lane) { return lane ^ mask; });
}
template <class V>
V from_lane_below(V value, int distance) {
  return exchange(value, [distance](int lane) { return lane < distance ? lane : lane - distance; });
}

// One number for all lanes: `better(a, b)` says whether a takes the place of b.
template <class Better>
int32_t best_of_lanes(int32_t value, Better better) {
  const uint32_t in = bits_of<uint32_t>(value);
  const uint32_t* out = emulated::with_warp(&in, 1, [&](emulated::Warp& warp) {
    int32_t best = bits_of<int32_t>(warp.in[0][0]);
    for (int lane = 1; lane < 32; ++lane) {
      const int32_t other = bits_of<int32_t>(warp.in[lane][0]);
      if (better(other, best)) best = other;
    }
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = bits_of<uint32_t>(best);
  });
  return bits_of<int32_t>(out[0]);
}
inline int32_t largest_of_lanes(int32_t value) {
  return best_of_lanes(value, [](int32_t a, int32_t b) { return a > b; });
}
inline int32_t smallest_of_lanes(int32_t value) {
  return best_of_lanes(value, [](int32_t a, int32_t b) { return a < b; });
}

}  // namespace fastllm::cuda
