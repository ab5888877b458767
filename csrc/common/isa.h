// Instruction-set levels: which exist, which this processor runs, which one is active.
#pragma once
#include <string>
#include <vector>

namespace fastllm {

struct Kernels;

const Kernels& active_kernels();
const char* active_isa();
std::vector<std::string> supported_isas();  // ascending; the last is the default
void set_isa(const std::string& name);      // throws std::invalid_argument if not supported here
std::string cpu_features();                 // the flags that decide, for `fastllm doctor`

}  // namespace fastllm
