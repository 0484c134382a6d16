#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include "model.h"

namespace {
namespace ffi = tvm::ffi;

int fail(const char* kind, const char* name, const char* what) {
  char text[512];
  std::snprintf(text, sizeof text, "`%s` %s", name, what);
  TVMFFIErrorSetRaisedFromCStr(kind, text);
  return -1;
}

int64_t floordiv(int64_t a, int64_t b) { return a / b - ((a % b != 0) && ((a < 0) != (b < 0))); }
int64_t floormod(int64_t a, int64_t b) { return a - floordiv(a, b) * b; }
int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t bytes_of(const DLTensor& tensor) {
  int64_t bytes = (tensor.dtype.bits + 7) / 8;
  for (int i = 0; i < tensor.ndim; ++i) bytes *= tensor.shape[i];
  return bytes;
}

TVMFFIAny any(const DLTensor* tensor) {
  TVMFFIAny made{};
  made.type_index = kTVMFFIDLTensorPtr;
  made.v_ptr = const_cast<DLTensor*>(tensor);
  return made;
}

TVMFFIAny any(int64_t number) {
  TVMFFIAny made{};
  made.type_index = kTVMFFIInt;
  made.v_int64 = number;
  return made;
}

DLTensor view(void* data, DLDevice device, DLDataType dtype, int rank, const int64_t* shape) {
  DLTensor made{};
  made.data = data;
  made.device = device;
  made.dtype = dtype;
  made.ndim = rank;
  made.shape = const_cast<int64_t*>(shape);
  return made;
}

bool compact(const DLTensor& tensor) {
  if (tensor.strides == nullptr || bytes_of(tensor) == 0) return true;
  int64_t step = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
    step *= tensor.shape[i];
  }
  return true;
}

int checked(const DLTensor* given, const char* name, DLDataType dtype, int rank) {
  if (given == nullptr) return fail("ValueError", name, "is missing");
  if (given->device.device_type != DEVICE) return fail("ValueError", name, "is on another kind of device");
  if (given->ndim != rank) return fail("ValueError", name, "has another number of dimensions");
  if (given->dtype.code != dtype.code || given->dtype.bits != dtype.bits || given->dtype.lanes != 1)
    return fail("TypeError", name, "has another dtype");
  return 0;
}
