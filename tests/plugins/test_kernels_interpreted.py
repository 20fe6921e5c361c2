"""The Triton kernels under Triton's interpreter against the NumPy references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = 32  # per kernel: one of each dtype, mask and tile, and eight with more tokens than one scan reads
# Both sides round float32 sums once, so they may differ by an element's last place: 2^-10 of it in float16, 2^-7 in
# bfloat16, to which the interpreter truncates where a GPU rounds.
LARGEST_ERROR = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def cases():
    command = [sys.executable, str(Path(__file__).with_name("interpreted_cases.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    cases = json.loads(result.stdout)
    assert len(cases) == 2 * CASES
    return cases


@pytest.mark.parametrize("op_name", ["SkipGateUp", "SkipDown"])
@pytest.mark.parametrize("mask", ["empty", "full", "one row", "ragged"])
@pytest.mark.parametrize("dtype", LARGEST_ERROR)
def test_kernel_equals_the_reference_when_interpreted(cases, op_name, mask, dtype):
    chosen = [c for c in cases if c["case"].startswith(op_name) and c["mask"] == mask and c["dtype"] == dtype]
    assert len(chosen) >= 2  # of each tile
    wrong = [f"{c['case']}: {c['error']}" for c in chosen if not c["error"] <= LARGEST_ERROR[dtype]]
    assert not wrong, "\n".join(wrong)


def test_skipped_rows_keep_their_bits_when_interpreted(cases):
    """SkipDown passes the residual on, any bit pattern; SkipGateUp does not touch the row."""
    wrong = [case["case"] for case in cases if not case["skipped_rows_kept"]]
    assert not wrong, "\n".join(wrong)


def test_every_due_element_is_written_once_when_programs_share_an_output(cases):
    wrong = [case["case"] for case in cases if not case["written_once"]]
    assert not wrong, "\n".join(wrong)
