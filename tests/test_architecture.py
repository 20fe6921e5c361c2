"""docs/architecture.md leads from the command to the artefact: the files it names do their part, in its order."""

import functools
import re

from tests.documents import ROOT, text_of
from tests.executed_files import print_executed_files
from tests.exporter import forked_commands

REFERENCE = ROOT / "tests" / "data" / "reference_mlp_routed"


def test_files_of_the_path_take_part_in_its_order_when_exported(tmp_path):
    path = text_of("docs/architecture.md").split("\n## From the command to the artefact\n")[1].split("\n## ")[0]
    named = list(dict.fromkeys(re.findall(r"`([a-z_]+/[\w/]+\.py)`", path)))
    # In a process that has everything imported: what is noted are calls, and an import makes thousands of them.
    command = [str(REFERENCE), "-o", str(tmp_path / "out")]
    process = forked_commands.start(functools.partial(print_executed_files, command), tmp_path / "messages")
    process.join()
    ended = forked_commands.ended(process, tmp_path / "messages")
    assert ended.returncode == 0, ended.stderr
    executed = ended.stdout.split()
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
