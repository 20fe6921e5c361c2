"""The README's commands, run one after the other as a new user would, on a tiny model."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

ROOT = Path(__file__).parents[1]


def readme_commands():
    """Every `dlo` line of the README's blocks of commands, without its comment."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith(("dlo ", "dlo-export "))]


def test_readme_shows_every_command():
    shown = {
        "dlo export" if line.startswith("dlo-export") else " ".join(line.split()[:2]) for line in readme_commands()
    }
    assert shown == {f"dlo {name}" for name in ("expand", "calibrate", "export", "run", "bench", "inspect", "parity")}


@pytest.fixture
def workplace(tmp_path):
    """What the README takes for granted: a checkpoint, another artefact, somebody's graph and an adapter to it."""
    save_tiny_llama(tmp_path / "model", layers=10, vocab=BYTE_VOCABULARY, tokenizer=True)
    return tmp_path


def test_readme_commands_work_when_run_in_order(workplace):
    ran = 0
    for command in readme_commands():
        program, *arguments = shlex.split(command)
        if "optimum-export/model.onnx" in arguments:
            continue  # tests/exporter/test_foreign_graph.py
        if "other-artefact/" in arguments:
            shutil.copytree(workplace / "artefact", workplace / "other-artefact")
        result = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip(), command
        ran += 1
    assert ran == 8
