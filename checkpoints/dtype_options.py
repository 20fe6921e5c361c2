"""The words of `--dtype`: apart from the table that explains them, which loads NumPy, so that `--help` is quick."""

from __future__ import annotations

FP32, FP16, BF16 = "fp32", "fp16", "bf16"

DTYPE_CHOICES = ("auto", FP32, FP16, BF16)
"""What a command offers; auto is the target's own choice."""
