"""docs/architecture.md leads from the command to the artefact: the files it names do their part, in its order."""

import re
import subprocess
import sys

from tests.documents import ROOT, text_of

REFERENCE = ROOT / "tests" / "data" / "reference_mlp_routed"


def test_files_of_the_path_take_part_in_its_order_when_exported(tmp_path):
    path = text_of("docs/architecture.md").split("\n## From the command to the artefact\n")[1].split("\n## ")[0]
    named = list(dict.fromkeys(re.findall(r"`([a-z_]+/[\w/]+\.py)`", path)))
    command = [sys.executable, "-m", "tests.executed_files", str(REFERENCE), "-o", str(tmp_path / "out")]
    executed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(named) > 30
    assert not [file for file in named if file not in executed]
    assert [file for file in executed if file in named] == named


def test_passes_are_made_in_the_pipeline_and_nowhere_else_in_the_exporter():
    made = {
        file.relative_to(ROOT).as_posix()
        for room in ("exporter", "runtimes", "plugins", "modeling")
        for file in (ROOT / room).rglob("*.py")
        if re.search(r"\b[A-Z]\w+Pass\(", file.read_text())
    }
    assert made == {"exporter/pipeline.py"}
