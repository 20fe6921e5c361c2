"""Measurements behind docs/results.md. Run from the repository: ``python -m benchmarks.<name>``."""

import sys

from benchmarks.common.endings import end_in_words

# Python's word for "a module is about to run": here one of ours does, and nobody merely imports this package.
if sys.argv[:1] == ["-m"]:
    end_in_words()
