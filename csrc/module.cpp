// The Python module attn_kernels._C. Importing it registers the CPU kernels of the ops (STABLE_TORCH_LIBRARY_IMPL in
// the other files); its functions tell how it was built, and let tests choose the SIMD level.
#include <string>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/kernels.h"
#include "python_module.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s}", "simd", attn::level().name, "compiler", compiler().c_str(), "cxx",
                       std::to_string(__cplusplus).c_str(), "torch", TORCH_BUILD_VERSION);
}

// The list that `item(i)`, a new reference or null, makes; null if one of them failed.
template <class Item>
PyObject* list_of(Py_ssize_t n, const Item& item) {
  PyObject* list = PyList_New(n);
  for (Py_ssize_t i = 0; list != nullptr && i < n; ++i) {
    PyObject* value = item(i);
    if (value == nullptr || PyList_SetItem(list, i, value) != 0) Py_CLEAR(list);
  }
  return list;
}

PyObject* simd_levels(PyObject*, PyObject*) {
  return list_of(attn::levels().n, [](Py_ssize_t i) { return PyUnicode_FromString(attn::levels().list[i].name); });
}

PyObject* use_simd(PyObject*, PyObject* name) {
  const char* wanted = name == Py_None ? "" : PyUnicode_AsUTF8AndSize(name, nullptr);
  if (wanted == nullptr) return nullptr;
  try {
    return PyUnicode_FromString(attn::use_level(wanted).name);
  } catch (const std::exception& error) {
    return attn::raise(error);
  }
}

PyObject* checksums(PyObject*, PyObject* arguments) {
  unsigned long long data = 0;
  Py_ssize_t bytes = 0, pieces = 0;
  if (!PyArg_ParseTuple(arguments, "Knn:checksums", &data, &bytes, &pieces)) return nullptr;
  if (bytes < 0 || pieces < 0) return PyErr_Format(PyExc_ValueError, "checksums: bytes and pieces must be >= 0");
  try {
    std::vector<uint64_t> sums(static_cast<size_t>(pieces));
    Py_BEGIN_ALLOW_THREADS;
    attn::checksums(reinterpret_cast<const void*>(data), static_cast<size_t>(bytes), pieces, sums.data());
    Py_END_ALLOW_THREADS;
    return list_of(pieces, [&](Py_ssize_t i) { return PyLong_FromUnsignedLongLong(sums[static_cast<size_t>(i)]); });
  } catch (const std::exception& error) {
    return attn::raise(error);
  }
}

// A wrong ATTN_KERNELS_SIMD is an error of the import, not of the first call.
int choose_level(PyObject*) {
  try {
    attn::level();
    return 0;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return -1;
  }
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS,
     "How the module was built (compiler, cxx, torch) and the SIMD level in use (simd)."},
    {"simd_levels", simd_levels, METH_NOARGS, "The SIMD levels that this CPU can run, best first."},
    {"use_simd", use_simd, METH_O,
     "For tests: makes all later calls in this process use that SIMD level (None: the first choice again). Returns the "
     "name of the one that was in use."},
    {"checksums", checksums, METH_VARARGS,
     "checksums(data, bytes, pieces): of that many pieces, of so many bytes each, that begin at an address: 64 bits "
     "that "
     "change with their bytes."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(choose_level)}, {0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "attn_kernels._C",
                          "Compiled CPU kernels of attn_kernels.",
                          0,
                          functions,
                          slots,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
