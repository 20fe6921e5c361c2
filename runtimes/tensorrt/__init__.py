"""Runs an artefact's TensorRT engines."""
