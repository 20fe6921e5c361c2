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
    tokens = [token for token in (first, last) if token is not None]
    names = {token: token for token in tokens}
    # In a template "$" begins the place of a text, and ":" what stands behind a name.
    if any(token.startswith("$") or ":" in token for token in tokens):
        names = {token: f"boundary_{number}" for number, token in enumerate(tokens)}

    def framed(text: str, sequence: int) -> list[str]:
        parts = (first and names[first], text, last and names[last])
        return [f"{part}:{sequence}" for part in parts if part is not None]

    backend.post_processor = processors.TemplateProcessing(
        single=framed("$A", 0),
        pair=framed("$A", 0) + framed("$B", 1),
        special_tokens=[
            {"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]} for token, name in names.items()
        ],
    )
