// Schemas and binding of torch.ops.blocksched, and the module blocksched._C that carries them.
#include <Python.h>

#include "adamw.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <exception>

STABLE_TORCH_LIBRARY_FRAGMENT(blocksched, m) {
  m.def(
      "mlp_forward(Tensor x, Tensor w1, Tensor w2, float eps, bool residual) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("mlp_inference(Tensor x, Tensor w1, Tensor w2, float eps, bool residual) -> Tensor");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor h, Tensor scale, "
      "bool residual, bool needs_dx, bool needs_dw1, bool needs_dw2) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(blocksched, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&blocksched::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&blocksched::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&blocksched::mlp_backward));
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

// adamw(table, sums, lr, beta1, beta2, weight_decay, eps, grad_scale, maximize, update), as in
// adamw.h; table int64 [rows, n] and sums float64 [n_blocks, 3] are dense. Not an op of torch:
// lists of tensors take the dispatcher 0.7 us a tensor here, more than the update of a small one.
PyObject* adamw(PyObject*, PyObject* args) {
  Py_buffer table, sums;
  blocksched::AdamwNumbers numbers;
  int maximize = 0, update = 0;
  if (!PyArg_ParseTuple(args, "y*w*ddddddpp", &table, &sums, &numbers.lr, &numbers.beta1,
                        &numbers.beta2, &numbers.weight_decay, &numbers.eps, &numbers.grad_scale,
                        &maximize, &update)) {
    return nullptr;
  }
  numbers.maximize = maximize != 0;
  numbers.update = update != 0;
  const int64_t row = int64_t(blocksched::Row::count) * int64_t(sizeof(int64_t));
  const blocksched::Table entries = {static_cast<const int64_t*>(table.buf), table.len / row};
  const char* problem = nullptr;
  Py_BEGIN_ALLOW_THREADS
  try {
    blocksched::adamw(entries, numbers, static_cast<double*>(sums.buf),
                      sums.len / int64_t(3 * sizeof(double)));
  } catch (const std::exception& error) {
    problem = "blocksched: AdamW on the CPU ran out of memory";
  }
  Py_END_ALLOW_THREADS
  PyBuffer_Release(&table);
  PyBuffer_Release(&sums);
  if (problem != nullptr) {
    PyErr_SetString(PyExc_RuntimeError, problem);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"adamw", adamw, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods,
                                   nullptr,               nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef BS_WITH_CUDA
  const int with_cuda = 1;
#else
  const int with_cuda = 0;
#endif
  const int interface = 1;  // another number whenever what Python calls changes: extension.py
  if (PyModule_AddIntConstant(module, "WITH_CUDA", with_cuda) != 0 ||
      PyModule_AddIntConstant(module, "INTERFACE", interface) != 0 ||
      PyModule_AddStringConstant(module, "BUILT_WITH_TORCH", TORCH_VERSION) != 0 ||
      PyModule_AddStringConstant(module, "CPU_ISA", cpu_isa()) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
