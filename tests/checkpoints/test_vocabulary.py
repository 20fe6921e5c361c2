import json

import pytest

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.tokenization.vocabulary import check_vocabulary
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer

FIVE = {"a": 0, "b": 4}


def saved(folder, content):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


# The largest id is 4; a model of 4 rows has one token too many, a padding token as a rule.
@pytest.mark.parametrize(
    "content",
    [
        {"model": {"vocab": FIVE}},
        {"model": {"vocab": [["a", 0.0]] * 5}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 4}, {"id": 1}]},
        {"added_tokens": [{"id": 4}]},
    ],
    ids=["map", "pieces", "added", "added_alone"],
)
def test_tokenizer_is_refused_when_more_than_one_token_has_no_row(tmp_path, content):
    file = saved(tmp_path, content)
    for vocab_size in (4, 5, 100):
        check_vocabulary(file, vocab_size)
    with pytest.raises(CheckpointError, match="has tokens up to id 4, the model has vocab_size 3") as caught:
        check_vocabulary(file, 3)
    assert str(file) in str(caught.value)
    assert "hint: the tokenizer belongs to another model" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": None, "added_tokens": 3},
        {"model": {"vocab": {"a": True, "b": "9"}}, "added_tokens": [9, {"id": 9.5}]},
    ],
)
def test_ids_are_passed_over_when_they_are_no_integers(tmp_path, content):
    check_vocabulary(saved(tmp_path, content), 1)


def test_real_tokenizer_is_taken_when_it_has_the_models_tokens(tmp_path):
    save_byte_tokenizer(tmp_path, BYTE_VOCABULARY)
    check_vocabulary(tmp_path / "tokenizer.json", BYTE_VOCABULARY)
    with pytest.raises(CheckpointError, match=f"up to id {BYTE_VOCABULARY - 1}"):
        check_vocabulary(tmp_path / "tokenizer.json", BYTE_VOCABULARY - 2)


def test_tokenizer_is_refused_when_its_file_is_cut_short(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        check_vocabulary(tmp_path / "tokenizer.json", 1)
