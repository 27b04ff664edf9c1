// The Python module attn_kernels._C_cuda. Importing it registers the CUDA kernels of the ops (STABLE_TORCH_LIBRARY_IMPL
// in the bindings); it needs no GPU to be imported.
#include "../python_module.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
#if defined(ATTN_EMULATED)
  return Py_BuildValue("{s:O,s:s}", "emulated", Py_True, "torch", TORCH_BUILD_VERSION);
#else
  return Py_BuildValue("{s:O,s:s,s:s,s:s}", "emulated", Py_False, "nvcc", ATTN_NVCC_VERSION, "architectures",
                       ATTN_CUDA_ARCHITECTURES, "torch", TORCH_BUILD_VERSION);
#endif
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS,
     "How the module was built: nvcc, architectures, torch; and whether it runs the kernels on the CPU instead, for "
     "tests (emulated)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "attn_kernels._C_cuda",
                          "Compiled CUDA kernels of attn_kernels.",
                          0,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModuleDef_Init(&definition); }
