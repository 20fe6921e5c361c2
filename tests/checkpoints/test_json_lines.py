import gzip
import os

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_lines import read_json_lines


def test_lines_are_read_with_their_numbers_when_some_are_empty(tmp_path):
    content = '{"a": 1}\n\n{"a": "\\ud83e\\udd99"}\n'
    (tmp_path / "plain.jsonl").write_text(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        lines = [*read_json_lines(tmp_path / name)]
        assert [line.values for line in lines] == [{"a": 1}, {"a": "🦙"}]
        assert [line.origin.rpartition("/")[2] for line in lines] == [f"{name} line 1", f"{name} line 3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "lines.jsonl line 2: is not JSON in UTF-8"),
        (b'{"a": "\xff"}', "lines.jsonl line 2: is not JSON in UTF-8"),
        (b'{"a": "\\ud83e"}', "lines.jsonl line 2: is not JSON in UTF-8"),
        (b"[" * 100_000, "lines.jsonl line 2: is not JSON in UTF-8"),
        (b"[1]", "lines.jsonl line 2: is a JSON list, expected an object"),
    ],
)
def test_a_line_is_named_when_it_is_no_object(tmp_path, line, message):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line)
    with pytest.raises(InputError, match=message):
        [*read_json_lines(file)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("folder.jsonl", "is a folder"),
        ("pipe.jsonl", "is no regular file"),
        ("cut.jsonl.gz", "cannot be read"),
        ("plain.jsonl.gz", "cannot be read"),
    ],
)
def test_a_file_is_named_when_it_cannot_be_read(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    (tmp_path / "plain.jsonl.gz").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match=f"{name}: {message}"):
        [*read_json_lines(tmp_path / name)]
