"""Kernels as a deliverable: one source and one library per model that need tvm-ffi and not TVM."""
