"""Passes that change how something is computed, not what."""
