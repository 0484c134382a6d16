ffi::Tensor made(const int64_t* shape, int rank, DLDataType dtype, DLDevice device) {
  ffi::ShapeView sizes(shape, rank);
  if (TVMFFIEnvGetDLPackManagedTensorAllocator() != nullptr)
    return ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, sizes, dtype, device);
  return ffi::Tensor::FromNDAlloc(Memory(), sizes, dtype, device);
}

void tried(int found) {
  if (found == 0) return;
  TVMFFIObjectHandle error;
  TVMFFIErrorMoveFromRaised(&error);
  throw ffi::details::ObjectUnsafe::ObjectRefFromObjectPtr<ffi::Error>(
      ffi::details::ObjectUnsafe::ObjectPtrFromOwned<ffi::Object>(static_cast<TVMFFIObject*>(error)));
}

std::vector<DLTensor*> tensors(ffi::PackedArgs args, int first, int count) {
  std::vector<DLTensor*> found;
  for (int i = 0; i < count; ++i) found.push_back(args[first + i].cast<DLTensor*>());
  return found;
}

void counted(ffi::PackedArgs args, int count, const char* what) {
  if (args.size() != count) TVM_FFI_THROW(TypeError) << what << ": " << args.size() << " arguments for " << count;
}

ffi::Array<ffi::Tensor> computed(const std::vector<DLTensor*>& inputs, const std::vector<DLTensor*>& weights) {
  int64_t shapes[MODEL_OUTPUTS][MODEL_RANK], bytes;
  tried(model_plan(inputs.data(), shapes, &bytes));
  DLDevice device = inputs[0]->device;
  ffi::Tensor space = made(&bytes, 1, DLDataType{kDLUInt, 8, 1}, device);
  ffi::Array<ffi::Tensor> outputs;
  std::vector<DLTensor*> places;
  for (int i = 0; i < MODEL_OUTPUTS; ++i) {
    ffi::Tensor output = made(shapes[i], kRanks[i], kDtypes[i], device);
    outputs.push_back(output);
    places.push_back(const_cast<DLTensor*>(output.GetDLTensorPtr()));
  }
  tried(model_run(inputs.data(), weights.data(), places.data(), space.data_ptr()));
  return outputs;
}

void call_call(ffi::PackedArgs args, ffi::Any* result) {
  counted(args, MODEL_INPUTS + MODEL_WEIGHTS, "call");
  *result = computed(tensors(args, 0, MODEL_INPUTS), tensors(args, MODEL_INPUTS, MODEL_WEIGHTS));
}

void call_bind(ffi::PackedArgs args, ffi::Any* result) {
  counted(args, MODEL_WEIGHTS, "bind");
  std::vector<ffi::Tensor> all;
  for (int i = 0; i < MODEL_WEIGHTS; ++i) all.push_back(kept(args[i].cast<ffi::Tensor>()));
  *result = ffi::Function::FromPacked([all](ffi::PackedArgs given, ffi::Any* found) {
    counted(given, MODEL_INPUTS, "the model");
    std::vector<DLTensor*> weights;
    for (const ffi::Tensor& one : all) weights.push_back(const_cast<DLTensor*>(one.GetDLTensorPtr()));
    *found = computed(tensors(given, 0, MODEL_INPUTS), weights);
  });
}

void call_run(ffi::PackedArgs args, ffi::Any* result) {
  counted(args, MODEL_INPUTS + MODEL_WEIGHTS + MODEL_OUTPUTS + 1, "run");
  std::vector<DLTensor*> given = tensors(args, 0, args.size());
  int64_t shapes[MODEL_OUTPUTS][MODEL_RANK], bytes;
  tried(model_plan(given.data(), shapes, &bytes));
  DLTensor* space = given.back();
  if (bytes_of(*space) < bytes) TVM_FFI_THROW(ValueError) << "the workspace has " << bytes_of(*space) << " of " << bytes << " bytes";
  if (space->device.device_type != DEVICE) TVM_FFI_THROW(ValueError) << "the workspace is on another kind of device";
  void* data = static_cast<char*>(space->data) + space->byte_offset;
  tried(model_run(given.data(), given.data() + MODEL_INPUTS, given.data() + MODEL_INPUTS + MODEL_WEIGHTS, data));
}

void call_workspace(ffi::PackedArgs args, ffi::Any* result) {
  counted(args, MODEL_INPUTS, "workspace");
  int64_t shapes[MODEL_OUTPUTS][MODEL_RANK], bytes;
  tried(model_plan(tensors(args, 0, MODEL_INPUTS).data(), shapes, &bytes));
  *result = bytes;
}
}  // namespace

#define MODEL_FUNCTION(name)                                                                              \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) { \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                            \
    call_##name(ffi::PackedArgs(reinterpret_cast<const ffi::AnyView*>(args), count), reinterpret_cast<ffi::Any*>(result)); \
    TVM_FFI_SAFE_CALL_END();                                                                              \
  }
MODEL_FUNCTION(call)
MODEL_FUNCTION(bind)
MODEL_FUNCTION(run)
MODEL_FUNCTION(workspace)
