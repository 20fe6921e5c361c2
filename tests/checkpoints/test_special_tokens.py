"""Tokens that are never cut, and those around a text."""

import pytest
from tokenizers import Tokenizer, models

from dlo_export.checkpoints.tokenization.special_tokens import TokenKind, add_boundary_tokens, keep_whole

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "<tool>"]
KINDS = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, 1, 1, TokenKind.USER_DEFINED]


@pytest.fixture
def backend():
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [], unk_token="<unk>"))
    keep_whole(tokenizer, TOKENS, KINDS)
    return tokenizer


def test_control_and_user_defined_tokens_stay_whole(backend):
    assert backend.encode("a<tool>b</s>").tokens == ["a", "<tool>", "b", "</s>"]
    # Decoding can leave out what controls, never what a user defined.
    assert "<tool>" in backend.decode([3, 5, 2])
    assert "</s>" not in backend.decode([3, 5, 2])


@pytest.mark.parametrize("first", [None, "<s>"])
@pytest.mark.parametrize("last", [None, "</s>"])
def test_boundary_tokens_stand_around_each_text(backend, first, last):
    add_boundary_tokens(backend, first, last)
    framed = [token for token in (first, "a", last) if token]
    assert backend.encode("a").tokens == framed
    assert backend.encode("a", "a").tokens == framed * 2
    assert backend.encode("a", add_special_tokens=False).tokens == ["a"]


@pytest.mark.parametrize(("first", "last"), [(":", "<a:b>"), ("$A", None), ("$", "boundary_0"), (":", ":")])
def test_boundary_tokens_stand_around_each_text_when_they_mean_something_in_a_template(first, last):
    tokens = ["a", *dict.fromkeys(token for token in (first, last) if token)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.add_special_tokens(tokens[1:])
    add_boundary_tokens(backend, first, last)
    framed = [token for token in (first, "a", last) if token]
    again = Tokenizer.from_str(backend.to_str())
    assert again.encode("a").tokens == framed
    assert again.encode("a", "a").ids == [tokens.index(token) for token in framed * 2]
