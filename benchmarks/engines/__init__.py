"""What `gpu_check` does with TensorRT engines."""
