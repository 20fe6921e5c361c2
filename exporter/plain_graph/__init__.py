"""The plain Llama decoder as an ONNX graph, built from its configuration."""
