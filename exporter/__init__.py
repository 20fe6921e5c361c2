"""Checkpoint or ONNX graph in, artefact out."""

__version__ = "0.1.0"
