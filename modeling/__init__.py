"""PyTorch side: the reference model, depth scaling and router calibration."""
