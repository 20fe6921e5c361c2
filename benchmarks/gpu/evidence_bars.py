"""What a GPU is asked to show, and whether the rows of all parts show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

Row = Mapping[str, Any]
WAYS: Final = ("Triton JIT", "cubin", "libdlo_plugins.so by a C++ host", "compute-sanitizer")
"""To launch the kernels; the last two are one, without and with somebody who looks on."""
BUILDERS_GRAPH: Final = "its builder's graph"
SUBJECTS: Final = ("reference_", "smollm2")
"""Whose parity is asked for: how names of models begin."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: Its subject.
        asked: Of it.
        found: By figures, or what is missing.
        passed: Whether it holds; None where it was not measured as a whole.
    """

    what: str
    asked: str
    found: str
    passed: bool | None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """For a table."""
        verdicts = {None: "not measured", True: "yes", False: "NO"}
        return self.what, self.asked, self.found, verdicts[self.passed]


def judge_bars(rows: Sequence[Row]) -> list[Bar]:
    """All bars, from the rows of all parts.

    Args:
        rows: As the parts have written them; those that are not there leave a bar not measured.
    """
    kernels, parity = _of(rows, "kernels"), _of(rows, "onnxruntime_parity")
    table = [row for row in kernels if ": the table's tiles, cubin" in row["what"]]
    bars = [
        _complete(
            "kernels against NumPy, three ways",
            "fp32 1e-5, fp16 2^-10, bf16 2^-7 of a row's largest; no finding",
            [row for row in kernels if "against NumPy" in row["what"] or "under compute-sanitizer" in row["what"]],
            {way: [row for row in kernels if way in row["what"]] for way in WAYS},
        ),
        _figures(
            "kernels, one token, 4096 x 14336, bf16",
            ">= 0.85 of the copy rate, <= 1.05 of cuBLAS",
            [row for row in table if row["what"].startswith("decode") and row["passed"] is not None],
            ("share_of_copy", "times_cublas"),
        ),
        _figures(
            "kernels, skipped, in a graph",
            "<= 3 us",
            [row for row in table if row["what"].startswith("skipped") and row["passed"] is not None],
            ("tokens", "median_us"),
        ),
        _figures(
            "kernels, 8 of 16 tokens active",
            "<= 1.1 of cuBLAS on 8 rows",
            [row for row in table if row["what"].startswith("half of 16 ")],
            ("times_cublas",),
        ),
        _figures(
            "kernels, 256 of 512 tokens active",
            ">= 0.7 of cuBLAS' speed: <= 1.43 of its time",
            [row for row in table if row["what"].startswith("half of 512 ")],
            ("times_cublas",),
        ),
    ]
    for part, active in (
        ("onnxruntime", lambda row: row["ratio_to_dense"]),
        ("pytorch", lambda row: row["over_dense"]["median"]),
    ):
        bars += _decode_bars(part, _of(rows, part), active)
    bars.append(
        _complete(
            "ONNX Runtime on CUDA, every lowering, fp32, fp16, bf16",
            "parity PASS",
            [row for row in parity if row["what"].startswith("parity ") and "--" not in row["what"]],
            {name: [row for row in parity if row["what"].startswith(f"parity {name}")] for name in SUBJECTS},
        )
    )
    return [*bars, _against_others(rows)]


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _complete(what: str, asked: str, rows: Sequence[Row], kinds: Mapping[str, Sequence[Row]]) -> Bar:
    """A bar of many comparisons, of which every kind must be there."""
    failed = [row["what"] for row in rows if not row["passed"]]
    missing = [name for name, found in kinds.items() if not found]
    if failed:
        return Bar(what, asked, f"{len(failed)} of {len(rows)} do not hold: {', '.join(failed[:3])}", False)
    if missing:
        return Bar(what, asked, f"no {', '.join(missing)}", None)
    return Bar(what, asked, f"all of {len(rows)} hold", True)


def _figures(what: str, asked: str, rows: Sequence[Row], names: Sequence[str]) -> Bar:
    """A bar that its rows have judged."""
    found = "; ".join(", ".join(f"{name} {row[name]}" for name in names) for row in rows)
    return Bar(what, asked, found or "no row", all(row["passed"] for row in rows) if rows else None)


def _decode_bars(part: str, rows: Sequence[Row], active: Callable[[Row], float]) -> list[Bar]:
    """A captured 8B's, at batch 1: skip efficiency at half, and the price of routing where nothing is skipped."""
    steps = {
        row["skipped"]: row
        for row in rows
        if row["what"] == "decode" and str(row["model"]).lower() == "8b" and row["batch"] == 1 and "skipped" in row
    }
    bars = []
    for skipped, what, asked in (
        (0.5, "skip efficiency, half of the MLPs skipped", ">= 0.9"),
        (0.0, "all active, over dense", "<= 1.03"),
    ):
        row = steps.get(skipped)
        found = "no row"
        if row is not None:
            kinds = ("removed", "proportional", "copied")
            by_kind = ", ".join(f"by {kind} {row.get(f'efficiency_{kind}')}" for kind in kinds)
            found = by_kind if skipped else f"{active(row):.3f}"
        bars.append(Bar(f"8B decode in {part}: {what}", asked, found, None if row is None else row["passed"]))
    return bars


def _against_others(rows: Sequence[Row]) -> Bar:
    """A dense step: the 8B's shape, captured, beside transformers, compiled; our runner's beside onnxruntime-genai's.

    One of the two is asked for; both are shown.
    """
    ours = [
        row["step_ms"]
        for row in _of(rows, "onnxruntime")
        if row["what"] == "decode" and (row["graph"], row["model"], row["batch"]) == ("dense", "8b", 1)
    ]
    theirs = [
        row["ms"]["median"]
        for row in _of(rows, "transformers")
        if (row.get("model"), row.get("form")) == ("8B", "compiled") and "ms" in row
    ]
    ratios = {
        "transformers' compiled": [ours[0] / theirs[0]] if ours and theirs else [],
        "onnxruntime-genai's": [row["ratio"] for row in _of(rows, "genai") if row["what"].endswith(BUILDERS_GRAPH)],
    }
    found = ", ".join(f"{'?' if not ratio else f'{ratio[0]:.3f}'} of {name}" for name, ratio in ratios.items())
    known = [ratio for found in ratios.values() for ratio in found]
    passed = any(ratio < 1 for ratio in known) if known else None
    return Bar("ONNX Runtime, dense bf16 decode", "faster than onnxruntime-genai or transformers", found, passed)
