"""Why a tokenizer is not converted."""

from __future__ import annotations


class UnknownTokenizerError(Exception):
    """A tokenizer is of a kind that is not known here, or that tokenizer.json cannot express.

    Never the user's to see as an error: the weights beside it are used all the same, with its text as a warning.
    """
