"""Decoders with a KV cache of fixed size: their interface, and steps translated to it."""
