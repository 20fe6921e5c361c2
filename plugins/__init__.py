"""The operators of domain `dlo`: Triton kernels, their NumPy references, and the ways into TensorRT and ONNX Runtime.

The operators' names, operands and attributes stand in graph_passes/spec/ops.py and nowhere else.
"""
