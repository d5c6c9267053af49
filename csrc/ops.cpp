// Schemas and binding of torch.ops.blocksched, and the module blocksched._C that carries them.
#include <Python.h>

#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

STABLE_TORCH_LIBRARY_FRAGMENT(blocksched, m) {
  m.def(
      "mlp_forward(Tensor x, Tensor w1, Tensor w2, float eps, bool residual) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("mlp_inference(Tensor x, Tensor w1, Tensor w2, float eps, bool residual) -> Tensor");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor h, Tensor scale, "
      "bool residual, bool needs_dx, bool needs_dw1, bool needs_dw2) -> (Tensor, Tensor, Tensor)");
  m.def(
      "block_sums_cpu(Tensor[] params, Tensor?[] grads, int[] blocks, int n_blocks) -> Tensor");
  m.def(
      "adamw_cpu(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, "
      "Tensor(f!)[] steps, float lr, float beta1, float beta2, float weight_decay, float eps, "
      "bool maximize, float grad_scale, bool skip, int[] seeds, int[] blocks, int n_blocks, "
      "bool sums) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blocksched, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&blocksched::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&blocksched::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&blocksched::mlp_backward));
  m.impl("block_sums_cpu", TORCH_BOX(&blocksched::block_sums));
  m.impl("adamw_cpu", TORCH_BOX(&blocksched::adamw));
}

#ifdef BS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(blocksched, CUDA, m) {
  m.impl("mlp_forward", TORCH_BOX(&blocksched::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&blocksched::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&blocksched::mlp_backward));
}
#endif

namespace {

const char* cpu_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
}

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef BS_WITH_CUDA
  const int with_cuda = 1;
#else
  const int with_cuda = 0;
#endif
  if (PyModule_AddIntConstant(module, "WITH_CUDA", with_cuda) != 0 ||
      PyModule_AddStringConstant(module, "BUILT_WITH_TORCH", TORCH_VERSION) != 0 ||
      PyModule_AddStringConstant(module, "CPU_ISA", cpu_isa()) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
