"""ONNX → ONNX passes on onnx_ir: find decoder layers, inject, route, lower, fuse."""
