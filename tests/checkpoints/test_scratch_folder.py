import tempfile

import pytest

from dlo_export.checkpoints.errors import MachineError
from dlo_export.checkpoints.files.scratch_folder import scratch_folder


def test_scratch_folder_is_removed_when_the_block_ends():
    with scratch_folder() as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()


def test_scratch_folder_names_its_variable_when_there_is_no_place_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(MachineError, match="TMPDIR"), scratch_folder():
        pass
