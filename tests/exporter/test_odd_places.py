"""Artefacts that lie where people put them: the current folder, folders of one name, odd names, without rights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.exporter.forked_commands import run
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

FEW = ("--rounds", "1", "--prompt-tokens", "8", "--decode-tokens", "2")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    model = save_tiny_llama(folder / "model", layers=1, vocab=BYTE_VOCABULARY, tokenizer=True)
    return export_model(ExportRequest(str(model), folder / "out", parity=False), Reporter()).folder


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((".",), ("here",)),
        (("other/here", "../here"), ("other/here", "../here")),
        (("other/[red]", "other/esc\x1b[31m"), ("[red]", r"esc\x1b[31m")),
        (("other/späße 日本",), ("späße 日本",)),
    ],
    ids=["current", "one name", "styles", "letters"],
)
def test_bench_calls_artefacts_what_tells_them_apart(
    artefact: Path, given: tuple[str, ...], shown: tuple[str, ...], tmp_path: Path
) -> None:
    here = shutil.copytree(artefact, tmp_path / "here")
    for name in given:
        if name.startswith("other"):
            shutil.copytree(artefact, here / name)
    ended = run("bench", *given, *FEW, working_folder=here)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("│")[1].strip() for line in ended.stdout.splitlines() if line.startswith("│")]
    assert rows == list(shown)


@pytest.mark.parametrize("command", [("run", "out", "hi", "-n", "2"), ("bench", "out", *FEW), ("inspect", "out")])
def test_artefact_is_read_where_nothing_may_be_written_and_told_to_be_unreadable_where_it_is(
    artefact: Path, command: tuple[str, ...], tmp_path: Path
) -> None:
    copy = shutil.copytree(artefact, tmp_path / "out")
    for path in (copy, *copy.iterdir()):
        path.chmod(path.stat().st_mode & ~0o222)
    ended = run(*command, working_folder=tmp_path, privileged=False)
    assert ended.returncode == 0, ended.stderr
    (copy / "model.onnx.data").chmod(0)
    ended = run(*command, working_folder=tmp_path, privileged=False)
    assert ended.returncode == 4
    assert "out/model.onnx.data: Permission denied" in ended.stderr
