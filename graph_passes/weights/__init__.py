"""How graphs store the weights of a layer: read as a checkpoint's tensors, and others stored alike."""
