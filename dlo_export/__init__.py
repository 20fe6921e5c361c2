"""Depth-scaled, dynamically routed Llama models: from checkpoints and ONNX graphs to artefacts that really skip work.

The repository keeps each room in a top-level folder; the links beside this file make them one import package.
"""

__version__ = "0.1.0"
