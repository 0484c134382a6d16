"""Run models with ONNX Runtime."""
