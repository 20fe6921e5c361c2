from __future__ import annotations

from pathlib import Path

from dlo_export.runtimes.memory import available_memory


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
