"""Passes on the KV cache of attention."""
