// What kernels use of the machine beyond C++: asynchronous copies into shared memory, matrix
// fragments and the matrix product of sm_80, warp shuffles. Nothing else in csrc/cuda is written in
// PTX, and shared memory is addressed by byte offsets, so that a twin of this file runs the same
// kernels on a CPU and checks every access (tests/native/cuda). Fragment layouts are those of the
// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
#pragma once
#include <cstdint>

namespace fastllm::cuda {

// Element types of q, P and the products; values travel as bits.
struct Bf16 {};
struct Fp16 {};

extern __shared__ uint4 shared_memory[];

template <class V>
__device__ __forceinline__ V& shared_at(uint32_t offset) {
  return *reinterpret_cast<V*>(reinterpret_cast<char*>(shared_memory) + offset);
}
__device__ __forceinline__ uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
}

template <class V>
__device__ __forceinline__ V load(const V* from) {
  return __ldg(from);
}
// For what an earlier kernel of the same stream wrote.
template <class V>
__device__ __forceinline__ V load_coherent(const V* from) {
  return *from;
}
template <class V>
__device__ __forceinline__ void store(V* to, V value) {
  *to = value;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ int32_t float_bits(float x) { return __float_as_int(x); }
__device__ __forceinline__ float float_of_bits(int32_t x) { return __int_as_float(x); }

// 16 bytes (or 4) from device memory to shared memory, past the registers; zeros if not `keep`.
// Both addresses are multiples of the size. Copies of a block land in the order of their commits.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool keep) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(keep ? 16 : 0));
}
__device__ __forceinline__ void copy_4(uint32_t to, const void* from, bool keep) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(keep ? 4 : 0));
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most kPending of this thread's commits have not landed.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Nothing here but barriers and waits orders plain accesses to shared memory: what a lane writes,
// others read after a barrier.
//
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
// r[i] of lane l: elements 2 * (l % 4) and the next of row l / 4 of matrix i; transposed: of column
// l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset)));
}

// d[16 x 8] += a[16 x 16] b[16 x 8] in fp32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<Bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Fp16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<Fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// a - b of two pairs.
template <class T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t subtract_pairs<Bf16>(uint32_t a, uint32_t b) {
  uint32_t r;  // sm_80 has no bf16 subtraction: b * -1 + a
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(r) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return r;
}
template <>
__device__ __forceinline__ uint32_t subtract_pairs<Fp16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;\n" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// a * b of two pairs.
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<Bf16>(uint32_t a, uint32_t b) {
  uint32_t r;  // sm_80 has no bf16 product: a * b + -0
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}
template <class T>
__device__ __forceinline__ float from_half(uint16_t bits);
template <>
__device__ __forceinline__ float from_half<Bf16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <>
__device__ __forceinline__ float from_half<Fp16>(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(x) : "h"(bits));
  return x;
}
// Bytes of {b, a}, 4 bits of the selector for each.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; exact at 0 and -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {  // 1 ulp; 0 of infinity
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

template <class V>
__device__ __forceinline__ V from_lane(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class V>
__device__ __forceinline__ V from_lane_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class V>
__device__ __forceinline__ V from_lane_below(V value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}
__device__ __forceinline__ int32_t largest_of_lanes(int32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}
__device__ __forceinline__ int32_t smallest_of_lanes(int32_t value) {
  return __reduce_min_sync(0xffffffffu, value);
}

}  // namespace fastllm::cuda
