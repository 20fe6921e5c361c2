"""Everything that opens a file of a given name refuses what cannot be read to its end, and does not wait for it."""

import os
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.files.regular_file import regular_size
from dlo_export.exporter.sources.model_proto import parsed_model


def test_size_is_that_of_the_file_when_a_link_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"three")
    (tmp_path / "link").symlink_to("file")
    assert regular_size(tmp_path / "link") == 5


@pytest.mark.parametrize("read", [read_json, MappedFile, parsed_model])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_reader_refuses_by_name_when_it_is_no_regular_file(tmp_path: Path, read, kind: str) -> None:
    path = tmp_path / "odd"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    with pytest.raises(InputError, match="odd"):
        read(path)
