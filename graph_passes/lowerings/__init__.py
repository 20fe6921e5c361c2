"""Passes that turn the masked form into one that skips work."""
