"""ONNX Runtime on a GPU: libdlo_ort.so's operators, and decoders whose step a CUDA graph captures.

First the operators against NumPy and a small decoder against the masked form, decisions changing between replays. Then
decoders with the shapes of Llama's 8B and 1B models and random weights, made on the card: a decode step behind 512
tokens, dense and with 0 to 100 % of the MLPs skipped, at batch 1, 4 and 16, and a prompt of 512 tokens. Norms are
tried three ways first, and the fastest is what the rest is measured with. Skip efficiency is as
`benchmarks.gpu.skip_efficiency` has it, the dense graph without half of its MLPs measured beside.

    export DLO_ORT_PLUGIN_LIBRARY=/path/to/libdlo_ort.so
    python -m benchmarks.gpu_onnxruntime --out evidence

Every piece is a process of its own: a fault of one leaves the others' figures alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.evidence import Evidence, run_part
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE
from dlo_export.plugins.ort_registration import check_library, no_library

PART = "onnxruntime"
# With about how many seconds each takes; the most valuable first.
PIECES = {"checks": 25, "8b": 50, "1b": 40}
SMOKE_PIECES = {"checks": 20, "8b-2-layers,1b-2-layers": 20}
_TAIL = 3000  # characters of what a process that died had written


def check() -> None:
    """On the CPU provider, in float32: the operators, the small decoder, and that the timing runs.

    Raises:
        DloError: There is no library.
        RuntimeError: Something is not as it should be.
    """
    library = _library()
    with tempfile.TemporaryDirectory() as folder:
        evidence = Evidence(f"{PART}_cpu", Path(folder), 120)
        run_piece(evidence, "checks", "cpu", library, small=True)
        run_piece(evidence, "small", "cpu", library, small=True)
        failed = [row for row in evidence.rows if row["passed"] is False]
    if failed:
        raise RuntimeError(f"on the CPU provider: {failed}")


def measure(evidence: Evidence, smoke: bool) -> None:
    """Every piece in a process of its own; those that break once more, uncaptured, for the figures there are."""
    options, pieces, broken = ["--smoke"] if smoke else [], SMOKE_PIECES if smoke else PIECES, []
    for piece, seconds in pieces.items():
        if evidence.fits(piece, seconds / 2):
            with evidence.guard(piece):
                broken += [piece] if _run_apart(evidence, piece, options) else []
    for piece in broken:
        if evidence.fits(f"{piece}, not captured", pieces[piece] / 2):
            with evidence.guard(piece):
                _run_apart(evidence, piece, [*options, "--uncaptured"])


def run_piece(evidence: Evidence, piece: str, device: str, library: Path, *, small: bool, capture: bool = True) -> None:
    """Runs a piece in this process.

    Args:
        evidence: Where rows go.
        piece: "checks", or shapes of `random_decoder.SHAPES` to be timed, with commas between them.
        device: "cpu" or "cuda".
        library: libdlo_ort.so.
        small: Everything once.
        capture: On a GPU, whether steps are captured.
    """
    import torch  # noqa: PLC0415 - heavy, and loads what ONNX Runtime's CUDA provider links to

    from benchmarks.gpu.decoder_edits import NORMS  # noqa: PLC0415 - as above
    from benchmarks.gpu.onnxruntime_checks import check_decoder, check_operators, check_router, check_runner  # noqa: PLC0415 - behind PyTorch
    from benchmarks.gpu.onnxruntime_times import time_decoders  # noqa: PLC0415

    if piece != "checks":
        for shape in piece.split(","):
            with evidence.guard(shape):
                time_decoders(evidence, device, library, shape, small=small, capture=capture)
        return
    check_operators(evidence, device, library, small=small, capture=capture)
    check_router(evidence, device, library, small=small, capture=capture)
    # ONNX Runtime's attention on one cache has no float32 kernel on a GPU.
    dtypes = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float16)
    for dtype, routed, norms in itertools.product(dtypes, (False, True), NORMS):
        with evidence.guard("decoder", routed=routed, dtype=str(dtype), norms=norms):
            check_decoder(evidence, device, library, routed=routed, dtype=dtype, capture=capture, norms=norms)
    with evidence.guard("runner"):
        check_runner(evidence, device, library)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with evidence.guard("decoder, unfilled slots", dtype=str(dtype)):
        check_decoder(evidence, device, library, routed=True, dtype=dtype, capture=capture, unfilled=1e4)


def _run_apart(evidence: Evidence, piece: str, options: Sequence[str]) -> bool:
    """Runs a piece in a process of its own; its rows become rows here as they come.

    Returns:
        Whether an exception, or a signal, ended anything of it.
    """
    before = len(evidence.rows)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_onnxruntime", "--piece", piece, "--out", folder]
        command += ["--budget-s", str(evidence.left), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        timer = threading.Timer(max(evidence.left, 1), process.kill)
        timer.start()
        try:
            assert process.stderr is not None, "it is a pipe"
            other = _pass_on(evidence, process.stderr)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
    broken = any("error" in row for row in evidence.rows[before:])
    if broken or code not in (0, 1):  # 1: a row that did not pass, which stands here too
        evidence.row(f"log of {piece}", passed=False, exit_code=code, tail=other[-_TAIL:])
        return True
    return False


def _pass_on(evidence: Evidence, lines: Any) -> str:
    """Writes the rows among the lines; returns the others."""
    other = []
    for line in lines:
        try:
            row = json.loads(line)
            what, passed = row.pop("what"), row.pop("passed")
        except (ValueError, KeyError, AttributeError, TypeError):
            other.append(line)
            continue
        values = {key: value for key, value in row.items() if key not in ("part", "at_s")}
        evidence.row(what, passed=passed, **values)
    return "".join(other)


def _library() -> Path:
    """libdlo_ort.so, from the environment.

    Raises:
        PluginLibraryError: There is none, or another one.
    """
    given = os.environ.get(ORT_LIBRARY_VARIABLE)
    if not given:
        raise no_library(["dlo::SkipGateUp", "dlo::SkipDown"])
    check_library(Path(given))
    return Path(given)


def _piece_main(arguments: Sequence[str]) -> NoReturn:
    parser = argparse.ArgumentParser()
    parser.add_argument("--piece", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--uncaptured", action="store_true")
    given = parser.parse_args(arguments)
    evidence = Evidence(PART, given.out, given.budget_s)
    with evidence.guard(given.piece):
        run_piece(evidence, given.piece, "cuda", _library(), small=given.smoke, capture=not given.uncaptured)
    code = evidence.close()
    # What is measured is written: how libraries take leave of a GPU is none of this piece's figures.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--piece" in given:
        _piece_main(given)
    return run_part(PART, __doc__, check, measure, given)


if __name__ == "__main__":
    sys.exit(main())
