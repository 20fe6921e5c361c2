"""Dependencies point one way, and what must start fast stays free of PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "checkpoints": set(),
    "graph_passes": {"checkpoints"},
    "modeling": {"checkpoints"},
    "plugins": {"checkpoints", "graph_passes"},
    "runtimes": {"checkpoints", "modeling", "plugins"},
    "exporter": {"checkpoints", "graph_passes", "modeling", "plugins", "runtimes"},
}


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_stands_below_them(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        for module in imported_modules(file)
        if module.split(".")[0] in ALLOWED
        or (module.startswith("dlo_export.") and module.split(".")[1] not in {room, *ALLOWED[room]})
    ]
    assert not wrong


@pytest.mark.parametrize(
    "module",
    [
        "dlo_export.exporter.cli",
        "dlo_export.exporter.export",
        "dlo_export.checkpoints.formats.gguf_checkpoint",
        "dlo_export.checkpoints.adapter.adapter",
        "dlo_export.checkpoints.depth.expansion",
    ],
)
def test_export_path_does_not_import_pytorch(module):
    code = f"import sys, {module}; sys.exit(sorted({{'torch', 'transformers'}} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
