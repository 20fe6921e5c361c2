"""tokenizer.json as text_encoder reads it."""

from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.tokenization.tokenizer_file import text_encoder
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer


def test_encoder_gives_tokens_without_special_ones_when_the_file_is_a_tokenizer(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path, BYTE_VOCABULARY)
    assert len(text_encoder(tmp_path / "tokenizer.json")("abc")) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": {"type": "BPE", "vocab": {"\xff": 1}}}', None])
def test_encoder_is_refused_by_file_when_it_is_no_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match="json: is no tokenizer"):
        text_encoder(file)
