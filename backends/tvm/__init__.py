"""Kernels compiled by Apache TVM, and what runs them. `tvm` is imported in this folder only."""
