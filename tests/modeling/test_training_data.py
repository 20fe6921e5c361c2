import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dlo_export.modeling.training.documents import open_tokenizer, tokenize_records
from dlo_export.modeling.training.errors import TrainingDataError
from dlo_export.modeling.training.packing import IGNORED, PackedDocuments, stacked
from dlo_export.modeling.training.records import Record, read_records
from tests.modeling.training_runs import opened, packed, save_chats, save_routed

CHAT = Record(
    "here",
    (
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "fünf"},
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_routed(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def line(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"d\.jsonl line 3: is not JSON"),
        (r'{"text": "half a \ud800 pair"}', r"line 3: is not JSON: .*surrogates not allowed"),
        ("[1]", r"line 3: is a JSON list, expected an object"),
        ('{"prompt": "x"}', r"line 3: has neither messages nor text, only prompt"),
        ('{"text": " "}', r"line 3: text is empty"),
        ('{"messages": []}', r"line 3: messages is not a list of turns"),
        (line(("tool", "x")), r"line 3: messages\[0\] has the role 'tool', expected one of system, user, assistant"),
        (line(("user", "x")), r"line 3: has no assistant turn, so nothing to learn"),
        ('{"messages": [{"role": "user"}]}', r"line 3: messages\[0\] has no text in content"),
    ],
)
def test_records_name_the_line_when_it_is_malformed(tmp_path: Path, bad: str, message: str) -> None:
    good = line(("user", "x"), ("assistant", "y"))
    (tmp_path / "d.jsonl").write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(TrainingDataError, match=message):
        read_records(tmp_path / "d.jsonl")


def test_records_raise_when_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"holds no \.jsonl"):
        read_records(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TrainingDataError, match=r"empty\.jsonl: is empty"):
        read_records(tmp_path)


def test_records_name_a_folders_file_when_it_cannot_be_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "nowhere.jsonl").symlink_to("missing.jsonl")
    with pytest.raises(TrainingDataError, match=r"nowhere\.jsonl: is no regular file\n\nhint: remove it, or replace"):
        read_records(tmp_path)
    with pytest.raises(TrainingDataError, match=r"/dev/null: is no regular file"):
        read_records(Path("/dev/null"))


def test_records_come_from_every_file_when_a_folder_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.md").write_text("three")
    assert [record.text for record in read_records(tmp_path)] == ["one", "two"]


def test_assistants_tokens_alone_are_learned_when_a_chat_is_read(tokenizer: Any) -> None:
    (document,) = tokenize_records([CHAT], tokenizer, length=64, long_chats="error").documents
    assert tokenizer.decode(document.tokens) == "<s>one?</s><s>two</s><s>three?</s><s>fünf</s>"
    assert tokenizer.decode(document.tokens[document.learned]) == "<s>two</s><s>fünf</s>"


def test_a_plain_chat_template_is_used_when_the_tokenizer_has_none(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer, lacked = open_tokenizer(tmp_path, tmp_path)
    assert lacked
    (document,) = tokenize_records([CHAT], tokenizer, length=128, long_chats="error").documents
    assert tokenizer.decode(document.tokens[document.learned]) == "two</s>\nfünf</s>\n"


def test_a_text_is_cut_into_pieces_when_it_is_long(tokenizer: Any) -> None:
    data = tokenize_records([Record("here", text="abcdefg")], tokenizer, length=3, long_chats="error")
    assert [tokenizer.decode(document.tokens) for document in data.documents] == ["abc", "def", "g</s>"]
    assert all(document.learned.all() for document in data.documents)


def test_a_long_chat_is_an_error_cut_or_left_out_as_asked(tokenizer: Any) -> None:
    short = Record("there", CHAT.messages[:2])
    with pytest.raises(TrainingDataError, match="here: the chat has 26 tokens, a sequence 16"):
        tokenize_records([short, CHAT], tokenizer, length=16, long_chats="error")
    cut = tokenize_records([short, CHAT], tokenizer, length=16, long_chats="truncate")
    assert [len(document.tokens) for document in cut.documents] == [11, 16]
    left_out = tokenize_records([short, CHAT], tokenizer, length=16, long_chats="skip")
    assert [len(document.tokens) for document in left_out.documents] == [11]
    assert (cut.shortened, left_out.skipped) == (1, 1)
    with pytest.raises(TrainingDataError, match="nothing is left: 1 chats are longer"):
        tokenize_records([CHAT], tokenizer, length=16, long_chats="skip")


def test_a_template_is_refused_when_it_rewrites_earlier_turns(tokenizer: Any) -> None:
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(TrainingDataError, match=r"writes messages\[1\] differently when others follow"):
            tokenize_records([CHAT], tokenizer, length=64, long_chats="error")
    finally:
        tokenizer.chat_template = template


@torch.no_grad()
def test_a_packed_document_equals_its_own_alone(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    chats = save_chats(tmp_path / "chats.jsonl", 12)
    documents = tokenize_records(read_records(chats), tokenizer, length=96, long_chats="error").documents
    model = opened(folder)
    sequences = packed(folder, chats, 96)
    assert len(sequences) < len(documents)
    seen = 0
    for index in range(len(sequences)):
        batch = stacked([sequences[index]])
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), 96]
        for start, end in itertools.pairwise(starts):
            ids = batch["input_ids"][:, start:end]
            np.testing.assert_allclose(logits[start:end], model(ids, use_cache=False).logits[0], atol=1e-4)
            seen += bool(batch["counted"][0, start])
    assert seen == len(documents)


def test_labels_are_the_learned_tokens_but_a_documents_first(tokenizer: Any) -> None:
    texts = [Record("here", text="abc"), Record("there", text="de")]
    data = tokenize_records(texts, tokenizer, length=8, long_chats="error")
    (sequence,) = [*map(PackedDocuments(data.documents, 8).__getitem__, [0])]
    ids = sequence["input_ids"].tolist()
    assert tokenizer.decode(ids) == "abc</s>de</s><unk>"
    assert sequence["labels"].tolist() == [IGNORED, *ids[1:4], IGNORED, *ids[5:7], IGNORED]
    assert sequence["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert sequence["counted"].tolist() == [True] * 7 + [False]
