"""Passes that add decoder layers, or remove them."""
