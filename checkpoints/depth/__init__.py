"""Depth scaling: where new layers go, what they are made of, the deeper model."""
