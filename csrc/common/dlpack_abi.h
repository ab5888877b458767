// The part of the DLPack 1.3 C exchange ABI that we read: a tensor's pointer, sizes and strides
// straight from the Python object, without linking against torch. Layouts follow
// the DLPack specification (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
#pragma once
#include <cstdint>

namespace fastllm::dlpack {

constexpr int kCpu = 1, kCuda = 2;
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null for a contiguous tensor
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* py_object, View* out);  // borrowed; 0 on success
  void* current_stream;
};

}  // namespace fastllm::dlpack
