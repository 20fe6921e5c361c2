"""Parity with a reference: cases, comparison, verdict."""
