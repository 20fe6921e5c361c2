"""What all tokenizers have in common: kinds of tokens, those that are never cut, and the first and last of a text."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from tokenizers import AddedToken, Tokenizer, processors


class TokenKind(IntEnum):
    """Kinds of tokens, with the numbers SentencePiece and GGUF give them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def keep_whole(backend: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Keeps control, unknown and user-defined tokens from being cut into pieces like any text.

    Args:
        backend: Gets them as added tokens; the first two kinds as special ones, which decoding can leave out.
        tokens: The vocabulary.
        kinds: `TokenKind` of each token.
    """
    special = (TokenKind.CONTROL, TokenKind.UNKNOWN)
    added = [
        AddedToken(token, normalized=False, special=kind in special)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in special or kind == TokenKind.USER_DEFINED
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def add_boundary_tokens(backend: Tokenizer, first: str | None, last: str | None) -> None:
    """Makes `encode` put a token before each text, after it, or both.

    Args:
        backend: Must know the tokens.
        first: Such as "<s>"; None puts none.
        last: Such as "</s>"; None puts none.
    """
    if first is None and last is None:
        return

    def framed(text: str, sequence: int) -> list[str]:
        return [f"{part}:{sequence}" for part in (first, text, last) if part is not None]

    backend.post_processor = processors.TemplateProcessing(
        single=framed("$A", 0),
        pair=framed("$A", 0) + framed("$B", 1),
        special_tokens=[(token, backend.token_to_id(token)) for token in {first, last} if token is not None],
    )
