using Held = int;

int taken(const DLTensor* given, const char* name, bool written, DLTensor* own, Held* held) {
  *own = *given;
  own->data = static_cast<char*>(given->data) + given->byte_offset;
  own->byte_offset = 0;
  if (!compact(*given)) return fail("ValueError", name, "is not contiguous");
  own->strides = nullptr;
  if (reinterpret_cast<uintptr_t>(own->data) % 16) return fail("ValueError", name, "does not begin at 16 bytes");
  return 0;
}

int copied(const DLTensor& from, const DLTensor& to) {
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, to.device.device_id));
  cudaError_t found = cudaMemcpyAsync(to.data, from.data, bytes_of(from), cudaMemcpyDeviceToDevice, stream);
  return found == cudaSuccess ? 0 : fail("RuntimeError", "a copy", cudaGetErrorString(found));
}

struct Memory {
  void AllocData(DLTensor* tensor) {
    ffi::CUDADeviceGuard guard(tensor->device.device_id);
    cudaError_t found = cudaMalloc(&tensor->data, std::max<int64_t>(bytes_of(*tensor), 1));
    if (found != cudaSuccess) TVM_FFI_THROW(MemoryError) << cudaGetErrorString(found);
  }
  void FreeData(DLTensor* tensor) { cudaFree(tensor->data); }
};

/* A weight that begins where kernels want it. */
ffi::Tensor kept(ffi::Tensor given) {
  return given;
}
