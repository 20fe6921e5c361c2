"""TensorRT plugins of domain `dlo`: Triton kernels, their NumPy references, and three ways to give them to TensorRT.

The operators' names, operands and attributes stand in graph_passes/spec/ops.py and nowhere else.
"""
