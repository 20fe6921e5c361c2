"""Text to ids with tokenizer.json alone."""

import pytest

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.tokenization.encoder import load_encoder
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer


def test_text_becomes_ids_without_special_tokens(tmp_path):
    save_byte_tokenizer(tmp_path, BYTE_VOCABULARY)
    encode = load_encoder(tmp_path)
    assert len(encode("héllo")) == len("héllo".encode())
    assert min(encode("héllo")) >= 3  # the first three are special


@pytest.mark.parametrize(("content", "words"), [(None, "has no tokenizer.json"), ("{}", "is no tokenizer")])
def test_model_is_named_when_it_has_no_usable_tokenizer(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=words) as raised:
        load_encoder(tmp_path, tmp_path / "model.gguf")
    assert ("give a folder" in raised.value.hint) == (content is None), "nothing can be saved into a GGUF file"
    assert "model.gguf" in str(raised.value)
