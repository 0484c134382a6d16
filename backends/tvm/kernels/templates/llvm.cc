using Held = std::vector<std::unique_ptr<void, decltype(&std::free)>>;

/* Kernels read whole vectors: what does not begin at 64 bytes is copied. */
int taken(const DLTensor* given, const char* name, bool written, DLTensor* own, Held* held) {
  *own = *given;
  own->data = static_cast<char*>(given->data) + given->byte_offset;
  own->byte_offset = 0;
  if (!compact(*given)) return fail("ValueError", name, "is not contiguous");
  own->strides = nullptr;
  if (reinterpret_cast<uintptr_t>(own->data) % 64 == 0) return 0;
  if (written) return fail("ValueError", name, "does not begin at 64 bytes");
  void* copy = std::aligned_alloc(64, padded(std::max<int64_t>(bytes_of(*own), 1)));
  if (copy == nullptr) return fail("MemoryError", name, "cannot be copied to memory that begins at 64 bytes");
  held->emplace_back(copy, &std::free);
  std::memcpy(copy, own->data, bytes_of(*own));
  own->data = copy;
  return 0;
}

int copied(const DLTensor& from, const DLTensor& to) {
  std::memcpy(to.data, from.data, bytes_of(from));
  return 0;
}

struct Memory {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(64, padded(std::max<int64_t>(bytes_of(*tensor), 1)));
    if (tensor->data == nullptr) TVM_FFI_THROW(MemoryError) << bytes_of(*tensor) << " bytes are not to be had";
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

/* A weight that begins where kernels want it. */
ffi::Tensor kept(ffi::Tensor given) {
  const DLTensor* from = given.GetDLTensorPtr();
  char* data = static_cast<char*>(from->data) + from->byte_offset;
  if (reinterpret_cast<uintptr_t>(data) % 64 == 0 || !compact(*from)) return given;
  ffi::Tensor made = ffi::Tensor::FromNDAlloc(Memory(), given.shape(), from->dtype, from->device);
  std::memcpy(made.data_ptr(), data, bytes_of(*from));
  return made;
}

/* What kernels with threads or buffers of their own ask of TVM's runtime. tvm-ffi puts the functions of libtvm_runtime
 * here when that is loaded; else these are used. */
struct Group { void* handle; int32_t count; };
typedef int (*Task)(int, Group*, void*);

int in_threads(Task task, void* data, int count) {
  int failed = 0;
  if (count == 0) count = omp_get_max_threads();
#pragma omp parallel for schedule(static, 1) num_threads(count) reduction(| : failed)
  for (int i = 0; i < count; ++i) {
    Group group{nullptr, count};
    failed |= task(i, &group, data);
  }
  return failed ? -1 : 0;
}

void* reserved(int, int, uint64_t bytes, int, int) { return std::aligned_alloc(64, padded(std::max<uint64_t>(bytes, 1))); }
int given_back(int, int, void* data) { std::free(data); return 0; }
}  // namespace

extern "C" {
extern __attribute__((weak)) void* __TVMBackendParallelLaunch;
extern __attribute__((weak)) void* __TVMBackendAllocWorkspace;
extern __attribute__((weak)) void* __TVMBackendFreeWorkspace;
}

namespace {
__attribute__((constructor)) void without_runtime() {
  if (&__TVMBackendParallelLaunch != nullptr) __TVMBackendParallelLaunch = reinterpret_cast<void*>(&in_threads);
  if (&__TVMBackendAllocWorkspace != nullptr) __TVMBackendAllocWorkspace = reinterpret_cast<void*>(&reserved);
  if (&__TVMBackendFreeWorkspace != nullptr) __TVMBackendFreeWorkspace = reinterpret_cast<void*>(&given_back);
}
