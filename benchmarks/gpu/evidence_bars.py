"""What a GPU is asked to show, and whether the rows of all parts show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.gpu.genai_graphs import IN_PLACE, PEER

Row = Mapping[str, Any]
WAYS: Final = ("Triton JIT", "cubin", "libdlo_plugins.so", "compute-sanitizer")
"""To launch the kernels; the last two are one, without and with somebody who looks on."""
MODELS: Final[Mapping[str, tuple[str, ...]]] = {
    "reference_mlp_routed": ("masked", "compact", "if", "plugin"),
    "reference_layer_routed": ("masked", "compact", "if"),
    "smollm2": ("masked", "compact", "if", "plugin"),
}
"""Whose parity is asked for, and in which lowerings."""
DTYPES: Final = ("fp32", "fp16", "bf16")
MODEL_DTYPES: Final = ("float32", "bfloat16")
"""In which the model class is held against itself."""
GRAPHS: Final = ("dense", "routed")
"""Of a captured decoder."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: Its subject.
        asked: Of it.
        found: By figures, or what is missing.
        passed: Whether it holds; None where it was not measured as a whole.
        needs: Parts of the evidence that measure it together; one such set is enough.
    """

    what: str
    asked: str
    found: str
    passed: bool | None
    needs: tuple[frozenset[str], ...]

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """For a table."""
        verdicts = {None: "not measured", True: "yes", False: "NO"}
        return self.what, self.asked, self.found, verdicts[self.passed]

    def is_due(self, parts: Collection[str]) -> bool:
        """Whether these parts are to measure it."""
        return any(need <= set(parts) for need in self.needs)


Finding = tuple[str, bool | None]
"""What was found, and whether the bar holds."""


@dataclasses.dataclass(frozen=True)
class _Question:
    """A bar before it is judged: `judge` answers it from the rows of all parts."""

    what: str
    asked: str
    needs: tuple[frozenset[str], ...]
    judge: Callable[[Sequence[Row]], Finding]

    def answered(self, rows: Sequence[Row]) -> Bar:
        """The bar; rows that cannot be read fail this one, say why, and cost no other."""
        try:
            found, passed = self.judge(rows)
        except Exception as err:  # a row of another form than the bar knows is a finding, and fails the evidence
            found, passed = f"its rows cannot be read: {type(err).__name__}: {err}", False
        return Bar(self.what, self.asked, found, passed, self.needs)


def judge_bars(rows: Sequence[Row]) -> list[Bar]:
    """All bars, from the rows of all parts.

    Rows are picked by their `kind` and the other fields that say what they are; `what` is for people.

    Args:
        rows: As the parts have written them; those that are not there leave a bar not measured.
    """
    return [question.answered(rows) for question in _QUESTIONS]


def _rows_of(rows: Sequence[Row], part: str, kind: str, **fields: Any) -> list[Row]:
    """Those that say of themselves all of this; of several values, one."""
    wanted = {"part": part, "kind": kind, **fields}
    return [
        row
        for row in rows
        if all(row.get(name) in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items())
    ]


def _complete(rows: Sequence[Row], kinds: Mapping[str, Sequence[Row]]) -> Finding:
    """Of many comparisons, of which every kind must be there."""
    failed = [row["what"] for row in rows if not row["passed"]]
    missing = [name for name, found in kinds.items() if not found]
    if failed:
        return f"{len(failed)} of {len(rows)} do not hold: {', '.join(failed[:3])}", False
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return f"no {', '.join(missing[:3])}{more}", None
    return f"all of {len(rows)} hold", True


def _kernels_right(rows: Sequence[Row]) -> Finding:
    ways = {way: _rows_of(rows, "kernels", "right", way=way) for way in WAYS}
    return _complete(_rows_of(rows, "kernels", "right"), ways)


def _kernel_figures(kind: str, names: Sequence[str], **fields: Any) -> Callable[[Sequence[Row]], Finding]:
    """A bar that its rows have judged: of the table's tiles, as they are shipped."""

    def judge(rows: Sequence[Row]) -> Finding:
        chosen = _rows_of(rows, "kernels", kind, way="cubin", tiles="table", passed=(True, False), **fields)
        found = "; ".join(", ".join(f"{name} {row[name]}" for name in names) for row in chosen)
        return (found, all(row["passed"] for row in chosen)) if chosen else ("no row", None)

    return judge


def _model_in_kernels(rows: Sequence[Row]) -> Finding:
    chosen = _rows_of(rows, "pytorch", "model")
    return _complete(chosen, {dtype: [row for row in chosen if row["dtype"] == dtype] for dtype in MODEL_DTYPES})


def _captured_8b(part: str, skipped: float) -> Callable[[Sequence[Row]], Finding]:
    """A captured 8B's step at batch 1: skip efficiency at half, and the price of routing where nothing is skipped."""

    def judge(rows: Sequence[Row]) -> Finding:
        chosen = _rows_of(rows, part, "decode", model=("8B", "8b"), batch=1, skipped=skipped)
        if not chosen:
            return "no row", None
        row = chosen[0]
        if not skipped:
            over_dense = row["ratio_to_dense"] if part == "onnxruntime" else row["over_dense"]["median"]
            return f"{over_dense:.3f}", row["passed"]
        kinds = ("removed", "proportional", "copied")
        return ", ".join(f"by {kind} {row[f'efficiency_{kind}']}" for kind in kinds), row["passed"]

    return judge


def _parity(rows: Sequence[Row]) -> Finding:
    compared = _rows_of(rows, "onnxruntime_parity", "parity")
    found = {
        f"{subject} in {dtype}, {lowering}": [
            row for row in compared if (row["subject"], row["dtype"], row["lowering"]) == (subject, dtype, lowering)
        ]
        for subject, dtype, lowering in _compared()
    }
    return _complete(compared, found)


def _placed(rows: Sequence[Row]) -> Finding:
    """Of the captured 8B's graphs, and of every lowering whose parity is asked for."""
    captured = _rows_of(rows, "onnxruntime", "placement")
    lowered = _rows_of(rows, "onnxruntime_parity", "placement")
    found = {f"8B {graph}": [r for r in captured if (r["model"], r["graph"]) == ("8b", graph)] for graph in GRAPHS}
    for wanted in _compared():
        found[" ".join(wanted)] = [r for r in lowered if (r["subject"], r["dtype"], r["lowering"]) == wanted]
    return _complete([*captured, *lowered], found)


def _compared() -> Iterator[tuple[str, str, str]]:
    """Subject, type and lowering of every comparison that parity is asked for."""
    for subject, lowerings in MODELS.items():
        yield from ((subject, dtype, lowering) for dtype in DTYPES for lowering in lowerings)


def _against_others(rows: Sequence[Row]) -> Finding:
    """A dense step: the 8B's shape, captured, beside transformers, compiled; our runner's beside onnxruntime-genai's.

    One of the two is asked for; both are shown.
    """
    ours = _rows_of(rows, "onnxruntime", "decode", graph="dense", model="8b", batch=1)
    theirs = [row for row in _rows_of(rows, "transformers", "decode", model="8B", form="compiled") if "ms" in row]
    genai = _rows_of(rows, "genai", "ratio", ours=IN_PLACE, theirs=PEER)
    ratios = {
        "transformers' compiled": ours[0]["step_ms"] / theirs[0]["ms"]["median"] if ours and theirs else None,
        "onnxruntime-genai's": genai[0]["ratio"] if genai else None,
    }
    known = [ratio for ratio in ratios.values() if ratio is not None]
    found = ", ".join(f"{'?' if ratio is None else f'{ratio:.3f}'} of {name}" for name, ratio in ratios.items())
    return found, any(ratio < 1 for ratio in known) if known else None


def _decode_questions(part: str) -> Iterator[_Question]:
    name, needs = f"8B decode in {part}", (frozenset({part}),)
    efficiency = "skip efficiency, half of the MLPs skipped"
    yield _Question(f"{name}: {efficiency}", ">= 0.9", needs, _captured_8b(part, 0.5))
    yield _Question(f"{name}: all active, over dense", "<= 1.03", needs, _captured_8b(part, 0.0))


_KERNELS: Final = (frozenset({"kernels"}),)
_QUESTIONS: Final = (
    _Question(
        "kernels against NumPy, three ways",
        "fp32 1e-5, fp16 2^-10, bf16 2^-7 of a row's largest; no finding",
        _KERNELS,
        _kernels_right,
    ),
    _Question(
        "kernels, one token, 4096 x 14336, bf16",
        ">= 0.85 of the copy rate, <= 1.05 of cuBLAS",
        _KERNELS,
        _kernel_figures("one token", ("share_of_copy", "times_cublas")),
    ),
    _Question("kernels, skipped, in a graph", "<= 3 us", _KERNELS, _kernel_figures("skipped", ("tokens", "median_us"))),
    _Question(
        "kernels, 8 of 16 tokens active",
        "<= 1.1 of cuBLAS on 8 rows",
        _KERNELS,
        _kernel_figures("some tokens", ("times_cublas",), tokens=16),
    ),
    _Question(
        "kernels, 256 of 512 tokens active",
        ">= 0.7 of cuBLAS' speed: <= 1.43 of its time",
        _KERNELS,
        _kernel_figures("some tokens", ("times_cublas",), tokens=512),
    ),
    *_decode_questions("onnxruntime"),
    *_decode_questions("pytorch"),
    _Question(
        "ONNX Runtime on CUDA, every lowering, fp32, fp16, bf16",
        "parity PASS",
        (frozenset({"onnxruntime"}),),
        _parity,
    ),
    _Question(
        "ONNX Runtime on CUDA: nodes of layers elsewhere, captured 8B and every lowering",
        "none",
        (frozenset({"onnxruntime"}),),
        _placed,
    ),
    _Question(
        "LlamaDloForCausalLM in the kernels, from a checkpoint folder",
        "equal to plain operators; no decision asked on the host",
        (frozenset({"pytorch"}),),
        _model_in_kernels,
    ),
    _Question(
        "ONNX Runtime, dense bf16 decode",
        "faster than onnxruntime-genai or transformers",
        (frozenset({"genai"}), frozenset({"onnxruntime", "transformers"})),
        _against_others,
    ),
)
