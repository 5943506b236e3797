#pragma once
#include <Python.h>

namespace metafast {

// Functions of the module metafast._C, see metafast/_C.pyi.
extern PyMethodDef draws_methods[];

}  // namespace metafast
