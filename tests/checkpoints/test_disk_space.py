import shutil
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import MachineError
from dlo_export.checkpoints.files.disk_space import check_disk_space, told_apart
from dlo_export.exporter.exit_codes import MACHINE, exit_code


@pytest.mark.parametrize("needed", [0, 1])
def test_disk_is_taken_when_it_has_room(tmp_path, needed):
    check_disk_space(tmp_path, needed, tmp_path / "out", "the weights need")


def test_disk_is_refused_under_the_name_shown_when_more_is_needed_than_it_has(tmp_path):
    needed = shutil.disk_usage(tmp_path).total + 2**20
    with pytest.raises(MachineError, match=r"^wanted/out: has \d+ MB free, the weights need \d+ MB\n") as caught:
        check_disk_space(tmp_path, needed, Path("wanted/out"), "the weights need")
    assert f"need {needed / 2**20:.0f} MB" in str(caught.value)
    assert "hint: free some space, or give another folder with -o" in str(caught.value)
    assert exit_code(caught.value) == MACHINE


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (3 << 20, 5 << 20, ("3 MB", "5 MB")),
        (0, 1 << 17, ("0.0 MB", "0.1 MB")),
        (1_000_000, 1_030_000, ("0.95 MB", "0.98 MB")),
        (1_048_570, 1_048_580, ("1,048,570 bytes", "1,048,580 bytes")),
    ],
)
def test_sizes_are_told_apart_when_they_are_nearly_the_same(one, other, words):
    assert told_apart(one, other) == words
