"""What an export does not need, it does not load."""

import subprocess
import sys
from pathlib import Path

from tests.tiny_models import save_tiny_llama

CODE = """
import sys
from dlo_export.exporter.cli import main
try:
    main(["export", sys.argv[1], "-o", sys.argv[2], "--no-parity"])
except SystemExit as end:
    assert not end.code
print(*sorted({"onnxruntime", "sympy.core", "torch", "transformers", "tokenizers"} & set(sys.modules)))
import onnx_ir
print(onnx_ir.SymbolicDim("past") + 1)
"""


def test_export_loads_no_heavy_library_when_nothing_is_run(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=(True, False, True))
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(model), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    *_, loaded, dimension = result.stdout.splitlines()
    assert loaded == ""
    assert "past" in dimension, "and sympy is there for whoever computes with dimensions"
