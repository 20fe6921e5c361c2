"""All evidence that needs a GPU but no TensorRT, in one command of ten minutes at most.

    python -m benchmarks.gpu_evidence --out DIR [--parts kernels,pytorch,…] [--budget-s 540] [--smoke]
    python -m benchmarks.gpu_evidence --out DIR --report     # runs nothing: the report of the rows that are there

Parts are kernels, pytorch, onnxruntime, genai and transformers; each is a command of its own (`PARTS`) in a process of
its own, gets its share of what is left of the budget, and writes DIR/<part>.jsonl as it goes: whatever ends one leaves
the figures taken so far, and costs no other part. What a command says stands in DIR/<command>.log. Afterwards DIR has
rows.md, a table of all rows, evidence.md, which says of every bar whether it holds, and decode.png, a plot of decode
steps against the share of MLPs skipped.

It runs from a checkout on PYTHONPATH; nothing of this project needs to be installed. DLO_ORT_PLUGIN_LIBRARY names
libdlo_ort.so. Prints the tables and one JSON line. Exit codes: 0 all holds; 1 something does not, or a bar was not
measured though its part was asked for (of a smoke run, whose times are held to nothing, no bar is), or a line is no row
or cannot be reported, which is named and costs no other; 2 bad arguments; 4 no GPU, or no library: each part has then
done what a CPU can check.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.common.measure import print_report
from benchmarks.gpu.evidence import BAR_MISSED, DONE, NO_GPU, make_folder
from benchmarks.gpu.evidence_bars import Bar, judge_bars
from dlo_export.checkpoints.errors import DloError, InputError
from dlo_export.exporter.exit_codes import exit_code, report_error

_GRACE_S: Final = 5.0  # a part that outruns its share by so much is ended


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the evidence.

    Attributes:
        module: In this folder.
        seconds: About what it takes; the budget is shared in these proportions.
        takes: The files it can be given, as options.
    """

    module: str
    seconds: float
    takes: tuple[str, ...] = ()


PARTS: Final[Mapping[str, tuple[Command, ...]]] = {
    "kernels": (Command("gpu_kernels", 40, ("cubins", "library", "host")),),
    "pytorch": (Command("gpu_pytorch", 100),),
    "onnxruntime": (Command("gpu_onnxruntime", 95), Command("gpu_onnxruntime_parity", 140, ("model",))),
    "genai": (Command("gpu_genai", 55),),
    "transformers": (Command("gpu_transformers", 70),),
}
"""In the order in which they run: what others are compared with last, since what it lacks costs one figure."""
_FILES: Final[Mapping[str, str]] = {
    "cubins": "folder that benchmarks.kernel_images wrote",
    "library": "libdlo_plugins.so",
    "host": "plugin_host, built beside it",
    "model": "a trained Llama, checkpoint folder or GGUF file, such as SmolLM2-135M's",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between them")
    parser.add_argument("--budget-s", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, table and plot")
    parser.add_argument("--smoke", action="store_true", help="everything once and small, to see that it runs")
    parser.add_argument("--report", action="store_true", help="write the report of the rows in --out, and run nothing")
    parser.add_argument(
        "--unchecked", action="store_true", help="leave out what a CPU can check: it was checked before"
    )
    for name, what in _FILES.items():
        parser.add_argument(f"--{name}", type=Path, help=f"{what}; what needs it is left out without it")
    parsed = parser.parse_args(arguments)
    given = {name: value for name in _FILES if (value := getattr(parsed, name.replace("-", "_"))) is not None}
    flags = [f"--{flag}" for flag in ("smoke", "unchecked") if getattr(parsed, flag)]
    try:
        commands = chosen_commands(parsed.parts)
        if parsed.report and not list(parsed.out.glob("*.jsonl")):
            raise InputError(
                f"--report: {parsed.out} has no rows", hint="give the --out of a run, with its .jsonl files"
            )
        make_folder(parsed.out)
    except (DloError, OSError) as err:
        report_error(err)
        return exit_code(err)
    codes = {} if parsed.report else run_commands(commands, parsed.out, parsed.budget_s, flags, given)
    rows, faults = read_rows(parsed.out)
    try:
        bars = write_report(rows, parsed.out, faults)
    except OSError as err:
        report_error(err)
        return exit_code(err)
    failed = [f"{row['part']}: {row['what']}" for row in rows if row["passed"] is False]
    failed += [bar.what for bar in bars if bar.passed is False]
    due = [] if parsed.smoke else [bar for bar in bars if bar.is_due(parsed.parts.split(","))]
    unmeasured = [bar.what for bar in due if bar.passed is None]
    for bar in bars:
        print(_printable(" | ".join(bar.cells)))
    for fault in faults:
        print(_printable(f"gpu_evidence: the report has a fault: {fault}"), file=sys.stderr)
    facts = {"codes": codes, "failed": failed, "not_measured": unmeasured, "faults": faults}
    print_report("gpu_evidence", ("part", "what", "passed", "figures"), table(rows), facts)
    if codes and set(codes.values()) == {NO_GPU}:
        return NO_GPU
    return BAR_MISSED if set(codes.values()) - {DONE} or failed or unmeasured or faults else DONE


def chosen_commands(parts: str) -> list[Command]:
    """The commands of the parts that were asked for.

    Raises:
        InputError: There is no such part.
    """
    names = parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(f"--parts: no part {', '.join(map(repr, unknown))}", hint=f"there are {', '.join(PARTS)}")
    return [command for name in names for command in PARTS[name]]


def run_commands(
    commands: Sequence[Command], out: Path, budget_s: float, flags: Sequence[str], given: Mapping[str, Path]
) -> dict[str, int]:
    """Runs commands one after the other; time that one leaves over goes to those behind it.

    Args:
        commands: What to run.
        out: Folder of rows.
        budget_s: Seconds for all.
        flags: For every command.
        given: Files by the names of the options that take them.

    Returns:
        Exit code of each; minus a signal's number where one ended it.
    """
    end = time.monotonic() + budget_s
    codes: dict[str, int] = {}
    seconds_left = sum(command.seconds for command in commands)
    for command in commands:
        share = max(0.0, end - time.monotonic()) * command.seconds / seconds_left
        seconds_left -= command.seconds
        words = [sys.executable, "-m", f"benchmarks.{command.module}", "--budget-s", f"{share:.0f}", "--out", str(out)]
        files = [f"--{name}={given[name]}" for name in command.takes if name in given]
        begin = time.monotonic()
        with (out / f"{command.module}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen([*words, *flags, *files], stdout=log, stderr=log, process_group=0)
            try:
                code, how = process.wait(share + _GRACE_S), "by itself"
            except subprocess.TimeoutExpired:
                # With what it has started, which would take the GPU's time from whoever is timed next.
                os.killpg(process.pid, signal.SIGKILL)
                code, how = process.wait(), "by force"
            except BaseException:  # this one is stopped, and a group of its own hears no Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        codes[command.module] = code
        took = time.monotonic() - begin
        print(f"{command.module}: ended {how} with {code}, {took:.0f} of {share:.0f} s", file=sys.stderr, flush=True)
    return codes


def read_rows(out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows that the parts have written, and what of them is no row; a last line that was cut short is left out."""
    rows, faults = [], []
    for file in sorted(out.glob("*.jsonl")):
        # Lines end with \n alone: others of Unicode's may stand in what a row quotes.
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            try:
                rows.append(_checked_row(json.loads(line)))
            except (ValueError, RecursionError) as err:  # of UTF-8 and of JSON too
                faults.append(f"{file.name}, line {number}: {err}")
    return rows, faults


def _checked_row(row: Any) -> dict[str, Any]:
    """What every row has, whatever else it says.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if problems := [name for name in ("part", "what") if not isinstance(row.get(name), str)]:
        raise ValueError(f"has no {' and no '.join(problems)}")
    if not isinstance(row.get("passed"), bool | None):
        raise ValueError(f"has a verdict of {row['passed']!r}, expected true, false or null")
    return {"passed": None, **row}


def table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows for people: what failed shows its error, not where it happened."""
    verdicts = {None: "", True: "yes", False: "NO"}
    left_out = {"part", "what", "passed", "at_s", "trace"}
    return [
        (
            _printable(row["part"]),
            _printable(row["what"]),
            verdicts[row["passed"]],
            _printable(", ".join(f"{name} {value}" for name, value in row.items() if name not in left_out)),
        )
        for row in rows
    ]


def _printable(text: str) -> str:
    """Without what no file or terminal takes: halves of characters, which JSON can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_report(rows: Sequence[Mapping[str, Any]], out: Path, faults: list[str]) -> list[Bar]:
    """Writes rows.md, evidence.md, and decode.png where decode steps were timed and matplotlib is installed.

    The rows come first: whatever is wrong with judging them, they are there.

    Args:
        rows: As `read_rows` gives them.
        out: Folder.
        faults: What could not be reported is added to them.
    """
    _write_table(out / "rows.md", ("part", "what", "passed", "figures"), table(rows))
    bars = judge_bars(rows)
    _write_table(out / "evidence.md", ("bar", "asked for", "found", "holds"), [bar.cells for bar in bars])
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("kind") == "decode" and {"skipped", "step_ms", "model", "batch"} <= row.keys():
            point = row["skipped"], row["step_ms"]
            name = f"{row['part']}, {str(row['model']).upper()}, batch {row['batch']}"
            if all(isinstance(value, int | float) for value in point):
                curves.setdefault(name, []).append(point)
            else:
                faults.append(f"{name}: cannot plot {point}")
    if curves and importlib.util.find_spec("matplotlib") is not None:
        try:
            plot(curves, out / "decode.png")
        except Exception as err:  # a plot costs the report nothing but the plot
            faults.append(f"decode.png: {type(err).__name__}: {err}")
    return bars


def _write_table(file: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [
        head,
        ["---"] * len(head),
        *([" ".join(cell.replace("|", "/").split()) for cell in cells] for cells in rows),
    ]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    file.write_text(_printable(text), encoding="utf-8")


def plot(curves: Mapping[str, Sequence[tuple[float, float]]], file: Path) -> None:
    """Draws decode steps against the share of MLPs skipped.

    Args:
        curves: By name, pairs of the share and of milliseconds per step.
        file: To write.
    """
    import matplotlib as mpl  # noqa: PLC0415 - heavy

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=mpl.colormaps["tab20"].colors)
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="share of MLPs skipped", ylabel="decode step [ms]", ylim=(0, None))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
