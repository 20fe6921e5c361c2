"""Export of SmolLM2-135M: `dlo-export --no-parity` against `mobius build --ep cpu`, wall time and peak memory.

Both commands start from the same fp32 Hugging Face folder and write an fp32 graph with external weights, each run
into a folder of its own. Runs alternate. Peak memory is what the kernel counted for the finished process (ru_maxrss
of wait4). Python's bytecode is there for both, as it is behind an installation: the first run, which does not count,
writes it into a folder of this benchmark's.

    python -m benchmarks.export_speed
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.measured_command import run_measured
from benchmarks.common.peers import peer_program
from benchmarks.common.smollm2 import smollm2_folder
from benchmarks.common.workspace import temporary_folder

BAR = 0.25


def run_once(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a command, as `run_measured` runs it."""
    seconds, usage = run_measured(command, log, environment)
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    model, mobius = str(smollm2_folder()), [*map(str, peer_program("mobius", "mobius"))]
    ours = str(Path(sys.executable).parent / "dlo-export")
    commands: dict[str, Callable[[str], list[str]]] = {
        "dlo-export --no-parity": lambda output: [ours, model, "-o", output, "--no-parity"],
        "mobius build --ep cpu": lambda output: [*mobius, "build", "--config", model, "--ep", "cpu", output],
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with temporary_folder() as bytecode:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
        for run in range(runs + 1):
            for name in commands if run % 2 else reversed(commands):
                with temporary_folder() as folder:
                    cost = run_once(commands[name](f"{folder}/out"), folder / "log", environment)
                if run:  # the first run of each reads files into the page cache, and compiles modules
                    measured[name].append(cost)

    seconds = {name: Samples(np.array([wall for wall, _ in costs])) for name, costs in measured.items()}
    megabytes = {name: Samples(np.array([peak for _, peak in costs])) for name, costs in measured.items()}
    first, second = commands
    ratios = {"wall": seconds[first] / seconds[second], "peak memory": megabytes[first] / megabytes[second]}
    rows = [
        ["wall, s", *(seconds[name] for name in commands), ratios["wall"], f"≤ {BAR}"],
        ["peak memory, MB", *(megabytes[name] for name in commands), ratios["peak memory"], f"≤ {BAR}"],
    ]
    print_report(
        "Export of SmolLM2-135M, fp32",
        ["", *commands, "ratio", "bar"],
        rows,
        {
            "dtype": "float32",
            "runs": runs,
            "warm_up": 1,
            "seconds": {name: samples.summary() for name, samples in seconds.items()},
            "peak_megabytes": {name: samples.summary() for name, samples in megabytes.items()},
            "ratios": {name: samples.summary() for name, samples in ratios.items()},
            "versions": {**versions("dlo-export", "onnx-ir", "numpy"), **peer_versions()},
        },
    )


def peer_versions() -> dict[str, str]:
    """Of mobius and what it stands on, as pinned."""
    lines = (Path(__file__).parent / "requirements-mobius.txt").read_text().split()
    pins = dict(line.split("==") for line in lines)
    return {f"mobius: {name}": pins[name] for name in ("mobius-onnx", "torch", "transformers")}


if __name__ == "__main__":
    main()
