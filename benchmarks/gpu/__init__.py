"""What the GPU evidence (`gpu_evidence` and its parts) stands on."""
