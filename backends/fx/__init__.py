"""ONNX to a torch.fx GraphModule and back: run, train, and write the weights into the same initializers."""
