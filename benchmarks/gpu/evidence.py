"""What a part of the GPU evidence writes: one JSON line per figure, as it goes, within a time budget."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import DloError, InputError, MachineError
from dlo_export.exporter.exit_codes import exit_code, report_error
from dlo_export.runtimes.tensorrt.gpu import find_gpu

DONE, BAR_MISSED, NO_GPU = 0, 1, 4
BEGUN = time.monotonic()
"""The process', for what it runs by its command line: imports come behind, of which PyTorch's takes a new machine ten
seconds."""


def begin_time(arguments: Sequence[str] | None) -> float:
    """When a part's time begins, on the monotonic clock.

    Args:
        arguments: Of its command line; None for the process' own, with which its time began.
    """
    return BEGUN if arguments is None else time.monotonic()


def make_folder(out: Path) -> None:
    """Makes the folder for rows, where it is missing.

    Raises:
        InputError: A file has its name, or that of a folder around it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise InputError(f"--out {out}: is no folder, or lies in none", hint="give a new one") from err


class Evidence:
    """The figures of one part.

    Args:
        part: Its name; rows go to `<out>/<part>.jsonl`.
        out: Folder, made where it is missing.
        budget_s: Seconds that the part may take.
        begun: When they began, on the monotonic clock; now, if not given.

    Attributes:
        out: As given.
        rows: What was written so far.
        budget_s: As given.
    """

    def __init__(self, part: str, out: Path, budget_s: float, begun: float | None = None) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self._part = part
        self._start = time.monotonic() if begun is None else begun
        self.budget_s = budget_s
        make_folder(out)
        self._file = (out / f"{part}.jsonl").open("w", encoding="utf-8")

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._start + self.budget_s - time.monotonic()

    def row(self, what: str, *, passed: bool | None = None, **values: Any) -> None:
        """Writes a figure, at once.

        Args:
            what: The subject, for people.
            passed: Whether it holds what was promised of it; None where nothing was.
            **values: Figures with their units in their names, such as median_us, and what they were taken with; of a
                row that a bar is judged by, its `kind` (`evidence_bars`).
        """
        at = round(time.monotonic() - self._start, 1)
        row = {"part": self._part, "what": what, "passed": passed, **values, "at_s": at}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        print(json.dumps(row), file=sys.stderr, flush=True)

    @contextmanager
    def guard(self, what: str, **values: Any) -> Iterator[None]:
        """Makes of an exception a row that failed, so that one fault does not cost the figures behind it."""
        try:
            yield
        except Exception as err:  # whatever a new card brings is a finding, and fails the part
            trace = traceback.format_exc(limit=-6)
            self.row(what, passed=False, error=f"{type(err).__name__}: {err}"[:2000], trace=trace[-3000:], **values)

    def fits(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; where not, a row says that the piece was left out."""
        if seconds <= self.left:
            return True
        self.row(what, left_out=f"needs about {seconds:.0f} s, {self.left:.0f} s are left")
        return False

    def close(self) -> int:
        """Prints the one JSON line.

        Returns:
            DONE, or BAR_MISSED where a row did not pass.
        """
        failed = [row["what"] for row in self.rows if row["passed"] is False]
        self._file.close()
        print(json.dumps({"benchmark": f"gpu_{self._part}", "rows": len(self.rows), "failed": failed}), flush=True)
        return BAR_MISSED if failed else DONE


def card() -> dict[str, Any]:
    """The first visible GPU and what drives it, as PyTorch sees it.

    Raises:
        MachineError: There is none.
    """
    found = find_gpu()
    if found.target is None:
        raise MachineError(found.reason, hint="what a CPU can check was checked; run it where an NVIDIA GPU is")
    import torch  # noqa: PLC0415 - heavy

    if not torch.cuda.is_available():
        raise MachineError(f"PyTorch {torch.__version__} has no CUDA", hint="install a CUDA build of PyTorch")
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "target": found.target,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def run_part(
    part: str,
    description: str | None,
    check: Callable[[], None],
    measure: Callable[[Evidence, bool], None],
    arguments: Sequence[str] | None = None,
    *,
    begun: float | None = None,
) -> int:
    """The command line of a part: what a CPU can check first, then the GPU.

    Args:
        part: Its name.
        description: For --help.
        check: What needs no GPU; raises where it does not hold.
        measure: What needs one; takes where rows go, and whether a smoke run was asked for.
        arguments: Of the command line; the process' own, if not given.
        begun: When its time began, on the monotonic clock; `begin_time` of the arguments, if not given.

    Returns:
        DONE, BAR_MISSED, NO_GPU after what a CPU can check, or the code of a user's error.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=180, help="seconds it may take")
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--smoke", action="store_true", help="everything once and small, to see that it runs")
    parser.add_argument(
        "--unchecked", action="store_true", help="leave out what a CPU can check: it was checked before"
    )
    begun = begin_time(arguments) if begun is None else begun
    parsed = parser.parse_args(arguments)
    try:
        if not parsed.unchecked:
            check()
        found = card()
        evidence = Evidence(part, parsed.out, parsed.budget_s, begun)
    except DloError as err:
        report_error(err)
        return exit_code(err)
    evidence.row("card", **found)
    with evidence.guard(part):
        measure(evidence, parsed.smoke)
    return evidence.close()
