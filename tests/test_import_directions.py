"""Dependencies point one way, and what must start fast stays free of PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "graph_passes": set(),
    "modeling": {"graph_passes.layer_init"},
    "runtimes": {"modeling"},
    "exporter": {"graph_passes", "modeling", "runtimes"},
}


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_stands_below_them(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        for module in imported_modules(file)
        if module.split(".")[0] in set(ALLOWED) - {package} and not {module, module.split(".")[0]} & ALLOWED[package]
    ]
    assert not wrong


@pytest.mark.parametrize(
    "module", ["exporter.cli", "exporter.export", "exporter.gguf_checkpoint", "modeling.adapter", "modeling.expansion"]
)
def test_export_path_does_not_import_pytorch(module):
    code = f"import sys, {module}; sys.exit(sorted({{'torch', 'transformers'}} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
