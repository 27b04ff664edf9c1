// A Python module in the limited API of Python 3.10 (setup.py sets Py_LIMITED_API): one binary serves that Python and all
// later ones. Only a free-threaded Python needs one of its own, because it has no limited API before 3.15.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>

namespace attn {

// What a function of the module returns for a C++ exception that it caught: nothing, with the Python exception set.
inline PyObject* raise(const std::exception& error) {
  PyObject* type = PyExc_RuntimeError;
  if (dynamic_cast<const std::invalid_argument*>(&error) != nullptr) type = PyExc_ValueError;
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) type = PyExc_MemoryError;
  PyErr_SetString(type, error.what());
  return nullptr;
}

}  // namespace attn
