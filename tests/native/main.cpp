// Tests of the native core, without Python and torch. Arguments name the suites to run; none runs
// all.
#include <set>

#include "harness.h"

using namespace fastllm;
using namespace fastllm::test;

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } suites[] = {{"parallel", test_parallel},
                {"elementwise", test_elementwise},
                {"products", test_products},
                {"packs", test_packs},
                {"attention", test_attention},
                {"attention_backward", test_attention_backward},
                {"sampling", test_sampling},
                {"training", test_training},
                {"losses", test_losses},
                {"latent", test_latent},
                {"experts", test_experts},
                {"moe_gate", test_moe_gate},
                {"expert_gradients", test_expert_gradients},
                {"quantize", test_quantize}};
  std::printf("runtime: %s; levels:", thread_runtime());
  for (const std::string& level : supported_isas()) std::printf(" %s", level.c_str());
  std::printf("\n");
  for (const auto& suite : suites) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::string(argv[i]) == suite.name;
    if (!wanted) continue;
    suite.run();
    std::printf("%s: ok\n", suite.name);
    std::fflush(stdout);
  }
  if (argc == 1) {
    const std::set<std::string> names(seen_kernels().begin(), seen_kernels().end());
    std::printf("%zu of %zu kernels of the table ran\n", names.size(),
                sizeof(Kernels) / sizeof(void*));
    CHECK(names.size() == sizeof(Kernels) / sizeof(void*));
  }
}
