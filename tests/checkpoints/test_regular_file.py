"""Everything that opens a file of a given name refuses what cannot be read to its end, and does not wait for it."""

import functools
import os
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.checkpoints.files.json_lines import read_json_lines
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.files.regular_file import regular_size
from dlo_export.checkpoints.files.text_files import read_text_file
from dlo_export.exporter.sources.model_proto import parsed_model
from dlo_export.modeling.training.records import data_files


def test_size_is_that_of_the_file_when_a_link_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"three")
    (tmp_path / "link").symlink_to("file")
    assert regular_size(tmp_path / "link") == 5


def _first_line(path: Path) -> object:
    return next(read_json_lines(path))


@pytest.mark.parametrize(
    "read",
    [read_json, MappedFile, parsed_model, _first_line, functools.partial(read_text_file, error=InputError), data_files],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "loop"])
def test_reader_refuses_by_name_when_it_is_no_regular_file(tmp_path: Path, read, kind: str) -> None:
    path = tmp_path / "odd"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to("odd")
    with pytest.raises(InputError, match="odd"):
        read(path)
