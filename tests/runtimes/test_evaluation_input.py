"""Texts and requests as they are read and turned into tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors

from dlo_export.runtimes.evaluation.encoding import encode_task, encode_text
from dlo_export.runtimes.evaluation.errors import EvaluationError
from dlo_export.runtimes.evaluation.evaluate import EvaluationSettings, plan_evaluation
from dlo_export.runtimes.evaluation.requests import read_task
from dlo_export.runtimes.evaluation.texts import Document, Text, read_text
from dlo_export.runtimes.generation.tokenizer import Tokenizer
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer

CHOICES = ({"context": "One and", "continuation": " two"}, {"context": "One and", "continuation": " six"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte, and none in front."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder, BYTE_VOCABULARY)
    return Tokenizer(folder)


def save_ending_tokenizer(folder: Path) -> Tokenizer:
    """A token for each byte, <s> in front and </s> behind."""
    save_byte_tokenizer(folder, BYTE_VOCABULARY)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    raw.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def save_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_texts_are_documents_of_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("Second.")
    (tmp_path / "a.txt").write_text("First.")
    (tmp_path / "notes.md").write_text("Not one.")
    save_lines(tmp_path / "c.jsonl", {"text": "Third."}, {"text": "Fourth."})
    assert [document.text for document in read_text(tmp_path).documents] == ["First.", "Third.", "Fourth.", "Second."]
    assert [document.text for document in read_text(tmp_path / "notes.md").documents] == ["Not one."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: no such file or folder"),
        ("empty.txt", b" \n", "empty.txt: is empty"),
        ("latin.txt", b"na\xefve", "latin.txt: is not UTF-8"),
        ("none.jsonl", b"", "none.jsonl: is empty"),
        ("other.jsonl", b'{"text": "a"}\n{"content": "b"}', "other.jsonl line 2: has no text, only content"),
        ("blank.jsonl", b'{"text": " "}', "blank.jsonl line 1: is empty"),
    ],
)
def test_a_text_is_refused_by_its_place(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_text(tmp_path / name)


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl", "nowhere.txt"])
def test_a_folders_text_is_refused_by_name_when_it_cannot_be_read_to_its_end(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.txt").write_text("One.")
    (tmp_path / "folder.txt").mkdir()
    if name == "nowhere.txt":
        (tmp_path / name).symlink_to("missing.txt")
    else:
        os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(EvaluationError, match=rf"{name}: is no regular file\n\nhint: "):
            read_text(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfFirst.\r\nSecond.")
    assert [document.text for document in read_text(tmp_path).documents] == ["First.\nSecond."]


@pytest.mark.parametrize(("sequence", "stride"), [(8, 8), (8, 3), (8, 1), (5, 5), (100, 100)])
def test_every_token_but_the_first_is_scored_once_whatever_the_windows(
    tokenizer: Tokenizer, sequence: int, stride: int
) -> None:
    documents = ("Naïve deep layers.", "Ünd mehr: 🦙!")
    text = Text("text", tuple(Document(str(n), each) for n, each in enumerate(documents)))
    encoded = encode_text(tokenizer, text, sequence=sequence, stride=stride, limit=None)
    assert encoded.documents == 2
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document)
        windows = [window for window in encoded.windows if window.document == number]
        scored = np.concatenate([window.segment.ids[window.segment.start :] for window in windows])
        assert scored.tolist() == ids[1:]
        assert max(window.segment.read for window in windows) <= sequence
        # What is scored in a later window has at least what overlaps before it.
        assert all(window.segment.start > sequence - stride for window in windows[1:])
        assert sum(window.scored_bytes or 0 for window in windows) == len(document[1:].encode())
    limited = encode_text(tokenizer, text, sequence=sequence, stride=stride, limit=1)
    assert (limited.documents, len(limited.windows)) == (1, 1)


def test_bytes_are_counted_and_contexts_end_where_they_do_when_the_tokenizer_ends_texts(tmp_path: Path) -> None:
    tokenizer = save_ending_tokenizer(tmp_path)
    text = Text("text", (Document("here", "Naïve deep layers."),))
    encoded = encode_text(tokenizer, text, sequence=8, stride=8, limit=None)
    assert sum(window.scored_bytes or 0 for window in encoded.windows) == len("Naïve deep layers.".encode())
    assert encoded.windows[-1].segment.ids[-1] == 2, "the end is foretold too"
    assert tokenizer.encode("Deep")[0] == 1
    assert tokenizer.decode(tokenizer.encode("Deep")) == "Deep"
    assert tokenizer.encode("Deep")[-1] != 2
    assert tokenizer.encode("Deep</s>")[-1] == 2, "written by the user"
    task = read_task(save_lines(tmp_path / "t.jsonl", CHOICES[0]))
    segment = encode_task(tokenizer, task, context=None, limit=None).segments[0][0]
    assert tokenizer.decode(segment.ids[segment.start :].tolist()) == " two"


def test_a_document_of_one_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(EvaluationError, match="here: has 1 tokens"):
        encode_text(tokenizer, Text("text", (Document("here", "a"),)), sequence=8, stride=8, limit=None)


def test_requests_are_grouped_by_document_in_both_forms(tmp_path: Path) -> None:
    own = [{"doc_id": "q", "label": 1, **choice} for choice in CHOICES]
    nested = [
        {"task_name": "counting", "doc_id": 0, "idx": idx, "label": 1, "request": choice}
        for idx, choice in enumerate(CHOICES)
    ]
    unconditional = [{**line, "doc_id": 1_000_000, "label": 0} for line in nested]
    first = read_task(save_lines(tmp_path / "own.jsonl", *own, CHOICES[0]))
    second = read_task(save_lines(tmp_path / "requests.jsonl", *nested, *unconditional))
    assert (first.name, second.name, first.unconditional, second.unconditional) == ("own", "counting", 0, 2)
    assert [question.label for question in first.questions] == [1, 0]
    assert [request.continuation for request in first.questions[0].requests] == [" two", " six"]
    assert [len(question.requests) for question in second.questions] == [2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "task.jsonl: holds no requests"),
        ([{"context": "a"}], "line 1: continuation is missing, expected text"),
        ([{"context": 1, "continuation": "b"}], "line 1: context is 1, expected text"),
        ([{"context": "a", "continuation": ""}], "line 1: continuation is '', expected text"),
        ([{"request": "a", "doc_id": 0}], "line 1: context is missing"),
        ([{"doc_id": 0, "label": 2, **CHOICES[0]}, {"doc_id": 0, "label": 2, **CHOICES[1]}], "line 1: label is 2, the"),
        ([{"doc_id": 0, "label": True, **CHOICES[0]}, {"doc_id": 0, "label": 1, **CHOICES[1]}], "label is True"),
        ([{"doc_id": 0, **CHOICES[0]}, {"doc_id": 0, **CHOICES[1]}], "line 1: label is None"),
        ([{"label": 1, **CHOICES[0]}], "line 1: label is 1, the document has 1 continuation"),
        (
            [{"doc_id": 0, "label": 0, **CHOICES[0]}, {"doc_id": 0, "label": 1, **CHOICES[1]}],
            "line 2: label is 1, 0 in",
        ),
        ([{"doc_id": [0], **CHOICES[0]}], r"line 1: doc_id is \[0\], expected a number"),
        ([{"doc_id": 0, "idx": 1, **CHOICES[0]}], "line 1: idx is 1, expected 0"),
    ],
)
def test_a_request_is_refused_by_its_line(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_task(save_lines(tmp_path / "task.jsonl", *lines))


def test_spaces_at_a_contexts_end_belong_to_the_continuation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = ({"context": "One and  ", "continuation": "two"}, {"context": " ", "continuation": "two"})
    encoded = encode_task(tokenizer, read_task(save_lines(tmp_path / "t.jsonl", *lines)), context=None, limit=None)
    (first,), (second,) = encoded.segments
    assert first.ids.tolist() == tokenizer.encode("One and  two")
    assert tokenizer.decode(first.ids[first.start :].tolist()) == "  two"
    # Nothing stands before it but the token that texts begin with.
    assert (second.ids.tolist(), second.start) == ([1, *tokenizer.encode(" two")], 1)


def test_a_context_loses_its_beginning_when_the_request_is_too_long(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = read_task(save_lines(tmp_path / "t.jsonl", *({"doc_id": 0, "label": 0, **choice} for choice in CHOICES)))
    encoded = encode_task(tokenizer, task, context=6, limit=None)
    assert encoded.truncated == 2
    assert [tokenizer.decode(segment.ids.tolist()) for segment in encoded.segments[0]] == ["and two", "and six"]
    assert {segment.scored for segment in encoded.segments[0]} == {4}
    with pytest.raises(EvaluationError, match=r"line 1: the continuation has 4 tokens, the model reads 3"):
        encode_task(tokenizer, task, context=3, limit=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence": 65, "context": 64}, "sequence is 65, the model's context has 64 tokens"),
        ({"sequence": 8, "stride": 9}, "stride is 9, expected 1 to the sequence's 8"),
        ({"sequence": 0}, "stride is 0, expected 1 to the sequence's 0"),
    ],
)
def test_settings_raise_when_they_contradict_each_other(settings: dict[str, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        EvaluationSettings(**settings)


def test_a_plan_is_refused_when_there_is_nothing_to_measure(tokenizer: Tokenizer) -> None:
    with pytest.raises(EvaluationError, match="nothing to measure"):
        plan_evaluation(tokenizer, [], [], EvaluationSettings())
