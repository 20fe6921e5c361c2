"""The commands: checkpoint or ONNX graph in, artefact out."""
