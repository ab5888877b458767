// The only file that knows Python. A native op is bound with one line: its name, its place in the
// kernel table, and the function that checks its tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "api/paging.h"
#include "common/call.h"
#include "common/dlpack_abi.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ops.h"
#include "small_calls.h"
#ifdef FASTLLM_WITH_CUDA
#include "cuda/moe_gate_params.h"
#include "cuda/paged_attention_params.h"
#include "cuda/quant_matmul_params.h"
#endif

namespace py = pybind11;
using fastllm::Tensor;

namespace fastllm {
namespace {

DType element_type(const dlpack::View& view) {
  if (view.lanes == 1) {
    switch (view.code << 8 | view.bits) {
      case dlpack::kFloat << 8 | 32: return DType::f32;
      case dlpack::kFloat << 8 | 64: return DType::f64;
      case dlpack::kFloat << 8 | 16: return DType::f16;
      case dlpack::kBfloat << 8 | 16: return DType::bf16;
      case dlpack::kInt << 8 | 8: return DType::i8;
      case dlpack::kUInt << 8 | 8: return DType::u8;
      case dlpack::kInt << 8 | 32: return DType::i32;
      case dlpack::kInt << 8 | 64: return DType::i64;
      case dlpack::kBool << 8 | 8: return DType::boolean;
    }
  }
  throw py::type_error("this tensor dtype has no native kernel");
}

const dlpack::ExchangeApi& exchange_api(py::handle object) {
  // One pointer per Python type; torch.Tensor and its subclasses share one.
  static PyTypeObject* known_type = nullptr;
  static const dlpack::ExchangeApi* known_api = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == known_type) return *known_api;
  py::object capsule = py::getattr(py::handle(reinterpret_cast<PyObject*>(type)),
                                   "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none())
    throw py::type_error("native ops take torch tensors (torch 2.11 or newer)");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != 1) throw py::type_error("unknown version of the DLPack exchange API");
  known_api = api;
  known_type = type;
  return *api;
}

Tensor tensor_view(py::handle object, int device_type) {
  if (object.is_none()) return {};
  dlpack::View view;
  if (exchange_api(object).view_from_object(object.ptr(), &view) != 0)
    throw py::error_already_set();
  if (view.device_type != device_type) throw py::value_error("a tensor is on another device");
  if (view.ndim > Tensor::kMaxDims) throw py::value_error("a tensor has too many dimensions");
  Tensor t;
  t.data = static_cast<char*>(view.data) + view.byte_offset;
  t.dtype = element_type(view);
  t.ndim = view.ndim;
  int64_t expect = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    t.shape[i] = view.shape[i];
    t.stride[i] = view.strides ? view.strides[i] : expect;
    expect *= view.shape[i];
  }
  if (!view.data && expect != 0)
    throw py::value_error("a tensor has no memory: its storage was freed, or it only says zero");
  return t;
}

template <class T>
T argument(py::handle object, int device_type = dlpack::kCpu) {
  if constexpr (std::is_same_v<T, Tensor>)
    return tensor_view(object, device_type);
  else
    return object.cast<T>();
}

class Graph;
thread_local Graph* recording = nullptr;  // the graph that this thread's calls are added to

// The native calls of a decode step and the tensors they point to.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  ~Graph() {
    if (recording == this) recording = nullptr;
  }
  void record(const Call& call, py::object owners) {
    calls_.push_back(call);
    owners_.push_back(std::move(owners));
    counters_.resize(calls_.size() * kCountersPerCall);
  }
  void replay() { run_calls(calls_.data(), calls_.size(), counters_.data()); }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const Call& call : calls_) out.emplace_back(call.name());
    return out;
  }

 private:
  std::vector<Call> calls_;
  std::vector<py::object> owners_;
  std::vector<TaskCounter> counters_;
};

// Binds an op: Python calls it with the arguments of its *_args function.
template <class Args, class... In, size_t... I>
void bind(py::module_& m, const char* name, Kernel<Args>* Kernels::* kernel, Args (*make)(In...),
          std::index_sequence<I...>) {
  m.def(name, [name, kernel, make](const py::args& args) {
    if (args.size() != sizeof...(In))
      throw py::type_error(std::string(name) + ": expected " + std::to_string(sizeof...(In)) +
                           " arguments");
    const Args checked = make(argument<In>(args[I])...);
    const Call call(name, active_kernels().*kernel, checked);
    if (recording) recording->record(call, args);
    py::gil_scoped_release released;
    if (runs_alone(checked))
      run_alone(call);
    else
      run_call(call);
  });
}
template <class Args, class... In>
void op(py::module_& m, const char* name, Kernel<Args>* Kernels::* kernel, Args (*make)(In...)) {
  bind(m, name, kernel, make, std::index_sequence_for<In...>{});
}

#ifdef FASTLLM_WITH_CUDA
// Binds an op on the GPU: the arguments of its check, then the stream (an integer) of the current
// device that its kernels are queued on.
template <class Args, class... In, size_t... I>
void bind_cuda(py::module_& m, const char* name, void (*launch)(const Args&, void*),
               Args (*make)(In...), std::index_sequence<I...>) {
  m.def(name, [name, launch, make](const py::args& args) {
    if (args.size() != sizeof...(In) + 1)
      throw py::type_error(std::string(name) + ": expected " + std::to_string(sizeof...(In) + 1) +
                           " arguments");
    launch(make(argument<In>(args[I], dlpack::kCuda)...),
           reinterpret_cast<void*>(args[sizeof...(In)].cast<uintptr_t>()));
  });
}
template <class Args, class... In>
void cuda_op(py::module_& m, const char* name, void (*launch)(const Args&, void*),
             Args (*make)(In...)) {
  bind_cuda(m, name, launch, make, std::index_sequence_for<In...>{});
}
#endif

}  // namespace
}  // namespace fastllm

PYBIND11_MODULE(_C, m) {
  using namespace fastllm;
  m.doc() = "fastllm's native kernels; called by fastllm.ops only";

  op(m, "rms_norm", &Kernels::rms_norm, rms_norm_args);
  op(m, "rms_norm_backward", &Kernels::rms_norm_backward, rms_norm_backward_args);
  m.def("rms_norm_backward_scratch", rms_norm_backward_scratch);
  op(m, "rope", &Kernels::rope, rope_args);
  op(m, "swiglu", &Kernels::swiglu, swiglu_args);
  op(m, "swiglu_backward", &Kernels::swiglu_backward, swiglu_backward_args);
  op(m, "append_kv", &Kernels::append_kv, append_kv_args);
  op(m, "append_mla", &Kernels::append_mla, append_mla_args);
  op(m, "rope_append_kv", &Kernels::rope_append_kv, rope_append_kv_args);
  op(m, "attention", &Kernels::attention, attention_args);
  op(m, "mla_attention", &Kernels::mla_attention, mla_attention_args);
  op(m, "paged_attention", &Kernels::paged_attention, paged_attention_args);
  op(m, "attention_backward", &Kernels::attention_backward, attention_backward_args);
  m.def("attention_backward_scratch", attention_backward_scratch);
  op(m, "quant_matmul", &Kernels::quant_matmul, quant_matmul_args);
  op(m, "finished_product", &Kernels::finished_product, finished_product_args);
  op(m, "finish_product", &Kernels::finish_product, finish_product_args);
  op(m, "quant_matmul_input_grad", &Kernels::quant_matmul_input_grad, quant_matmul_input_grad_args);
  op(m, "linear", &Kernels::linear, linear_args);
  op(m, "lora_add", &Kernels::linear, lora_add_args);
  op(m, "head_linear", &Kernels::head_linear, head_linear_args);
  op(m, "embedding", &Kernels::embedding, embedding_args);
  op(m, "quant_embedding", &Kernels::embedding, quant_embedding_args);
  op(m, "embedding_backward", &Kernels::embedding_backward, embedding_backward_args);
  op(m, "adamw_step", &Kernels::adamw_step, adamw_step_args);
  op(m, "sum_of_squares", &Kernels::sum_of_squares, sum_of_squares_args);
  m.def("sum_of_squares_scratch", sum_of_squares_scratch);
  op(m, "pack", &Kernels::pack, pack_args);
  op(m, "pack_rows", &Kernels::pack, pack_rows_args);
  op(m, "unpack_rows", &Kernels::unpack, unpack_rows_args);
  op(m, "unpack_blocks", &Kernels::unpack, unpack_blocks_args);
  op(m, "quantize", &Kernels::quantize, quantize_args);
  op(m, "dequantize", &Kernels::dequantize, dequantize_args);
  op(m, "log_probs", &Kernels::log_probs, log_probs_args);
  op(m, "top_log_probs", &Kernels::top_log_probs, top_log_probs_args);
  op(m, "sampling", &Kernels::sampling, sampling_args);
  op(m, "log_prob_rows", &Kernels::loss_rows, log_prob_rows_args);
  op(m, "cross_entropy_rows", &Kernels::loss_rows, cross_entropy_rows_args);
  op(m, "target_gradient_rows", &Kernels::loss_rows, target_gradient_rows_args);
  op(m, "kl_rows", &Kernels::kl_rows, kl_rows_args);
  op(m, "kl_top_rows", &Kernels::kl_rows, kl_top_rows_args);
  op(m, "gradient_product", &Kernels::gradient_product, gradient_product_args);
  m.def("gradient_product_scratch", gradient_product_scratch);
  op(m, "column_sums", &Kernels::column_sums, column_sums_args);
  op(m, "moe_gate", &Kernels::moe_gate, moe_gate_args);
  m.def("moe_gate_scratch", moe_gate_scratch);
  op(m, "moe_gate_backward", &Kernels::moe_gate_backward, moe_gate_backward_args);
  op(m, "moe_dispatch", &Kernels::moe_dispatch, moe_dispatch_args);
  m.def("moe_dispatch_scratch", moe_dispatch_scratch);
  op(m, "moe", &Kernels::moe, moe_args);
  op(m, "quant_moe", &Kernels::quant_moe, quant_moe_args);
  m.def("moe_scratch", moe_scratch);
  op(m, "grouped_matmul", &Kernels::grouped_matmul, grouped_matmul_args);
  op(m, "grouped_weight_grad", &Kernels::grouped_weight_grad, grouped_weight_grad_args);
  op(m, "moe_backward", &Kernels::moe_backward, moe_backward_args);
  op(m, "quant_moe_backward", &Kernels::quant_moe_backward, quant_moe_backward_args);

#ifdef FASTLLM_WITH_CUDA
  cuda_op(m, "moe_gate_cuda", cuda::moe_gate, cuda::moe_gate_call);
  cuda_op(m, "paged_attention_cuda", cuda::paged_attention, cuda::paged_attention_call);
  cuda_op(m, "quant_matmul_cuda", cuda::quant_matmul, cuda::quant_matmul_call);
#endif

  m.def("check_paging_values",
        [](py::handle block_table, py::handle cu_seqlens, py::handle cache_seqlens, int64_t tokens,
           int64_t num_pages, int64_t page_size) {
          check_paging_values(argument<Tensor>(block_table), argument<Tensor>(cu_seqlens),
                              argument<Tensor>(cache_seqlens), tokens, num_pages, page_size);
        });
  m.def("attention_scratch", [](py::handle q, py::handle k, py::handle v, py::handle cu_seqlens_q) {
    return attention_scratch(argument<Tensor>(q), argument<Tensor>(k), argument<Tensor>(v),
                             argument<Tensor>(cu_seqlens_q));
  });
  m.def("isa", active_isa, "the active instruction-set level");
  m.def("isas", supported_isas, "the levels that this processor runs, ascending");
  m.def("set_isa", set_isa);
  m.def("cpu_features", cpu_features);
  m.def("num_threads", num_threads);
  m.def("set_own_threads", set_own_threads);
  m.def("thread_runtime", thread_runtime);

  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("replay", &Graph::replay, py::call_guard<py::gil_scoped_release>())
      .def("names", &Graph::names)
      .def("begin",
           [](Graph& graph) {
             if (recording)
               throw std::runtime_error("a graph is already being captured on this thread");
             recording = &graph;
           })
      .def("end", [](Graph& graph) {
        if (recording == &graph) recording = nullptr;
      });
  m.def("recording", [] { return recording != nullptr; });
}
