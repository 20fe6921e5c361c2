from __future__ import annotations

from pathlib import Path

import pytest

from dlo_export.runtimes.errors import BackendUnavailableError
from dlo_export.runtimes.memory import available_memory, check_memory, in_words


def test_available_memory_obeys_the_containers_limit_when_there_is_one(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    assert available_memory(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 600000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    assert available_memory(meminfo, tmp_path) == 2000000 - 400000
    assert available_memory(tmp_path / "none", tmp_path) == 2000000 - 400000


def test_what_memory_does_not_hold_is_refused_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlo_export.runtimes.memory.available_memory", lambda: 3 << 30)
    check_memory(3 << 30)
    with pytest.raises(BackendUnavailableError, match=r"^3\.0 GB of memory are free"):
        check_memory((3 << 30) + 1)
    assert (in_words(2**40), in_words(2**29)) == ("1,024.0 GB", "512.0 MB")
