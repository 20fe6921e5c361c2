"""Passes that add decoder layers."""
