"""The dlo kernels on a GPU: three ways against NumPy, then their speed beside the card's own and cuBLAS'.

Options beside those below: `--cubins DIR`, what `python -m benchmarks.kernel_images` wrote on any machine; `--library`
libdlo_plugins.so and `--host` plugin_host, both built on any machine by `plugins/library`; without them their rows say
that they were left out.

Bars: fp32 1e-5, fp16 2^-10, bf16 2^-7 of the row's largest output. One token, hidden 4096, intermediate 14336, bf16:
at least 85 % of the measured copy rate, at most 1.05 times cuBLAS' three products; skipped: at most 3 µs for both
kernels in a graph; 16 tokens, 8 active: at most 1.1 times cuBLAS on 8 rows; 512 tokens, 256 active: at least 70 % of
cuBLAS' speed on 256 rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from benchmarks.gpu.copy_rate import copy_rate
from benchmarks.gpu.evidence import Evidence, run_part
from benchmarks.gpu.evidence_bars import WAYS
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.kernel_cases import LARGEST_ERROR, POISON, cases
from benchmarks.gpu.kernel_launch import LoadedImage
from benchmarks.gpu.kernel_timing import (
    Launch,
    Layer,
    Timing,
    layer,
    least_kernel,
    product_rate,
    read_rate,
    timed,
)
from benchmarks.kernel_images import Image, images_in
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.tiles import TILE_NAMES, TileName, tile_for

LARGE: Final = (4096, 14336)
SMALL: Final = (2048, 8192)
Pair = tuple[Launch, Launch]
"""SkipGateUp and SkipDown."""


def check() -> None:
    """What needs no GPU: the references' own outputs pass, and what a wrong kernel would leave does not."""
    for op_name in PLUGIN_OPS:
        for dtype in LARGEST_ERROR:
            for case in cases(op_name, dtype, "decode", ("alternating", "nan")):
                right = case.expected.copy()
                if op_name == "SkipGateUp":
                    right[case.scale == 0] = np.frombuffer(bytes([POISON] * right.itemsize), right.dtype)
                assert case.judge(right)["passed"], case.name
                if case.mask == "nan":
                    continue  # a row of NaN is what poison can look like
                unwritten = np.frombuffer(bytes([POISON]) * right.nbytes, right.dtype).reshape(right.shape)
                assert not case.judge(unwritten)["passed"], case.name
                touched = right.copy()
                touched[case.scale == 0] = 1
                assert not case.judge(touched)["passed"] or not (case.scale == 0).any(), case.name


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where timed kernels come from.

    Attributes:
        way: To launch them.
        tiles: The table's, or the fastest of this run's candidates.
    """

    way: Literal["Triton JIT", "cubin"]
    tiles: Literal["table", "best"]

    @property
    def what(self) -> str:
        """For people."""
        return "the best candidates" if self.tiles == "best" else f"the table's tiles, {self.way}"

    @property
    def fields(self) -> dict[str, str]:
        """For rows."""
        return dataclasses.asdict(self)


class Kernels:
    """Launchers of the table's tiles, by image where a folder is given, otherwise by Triton's JIT."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._images = [] if folder is None else images_in(folder)
        self._loaded: dict[str, LoadedImage] = {}

    @property
    def way(self) -> Literal["Triton JIT", "cubin"]:
        """How they are launched."""
        return "Triton JIT" if self._folder is None else "cubin"

    def table(self, dtype: str, tokens: int) -> Pair:
        """What is launched for so many tokens."""
        tile = tile_for(tokens)
        return self._table("SkipGateUp", dtype, tile), self._table("SkipDown", dtype, tile)

    def candidates(self, op_name: str, tile: TileName) -> list[Image]:
        """Other sizes for a tile."""
        return [
            image for image in self._images if (image.kind, image.op_name, image.tile) == ("candidate", op_name, tile)
        ]

    def load(self, image: Image) -> LoadedImage:
        """Loaded once."""
        assert self._folder is not None
        if image.file not in self._loaded:
            self._loaded[image.file] = LoadedImage(image, self._folder)
        return self._loaded[image.file]

    def _table(self, op_name: str, dtype: str, tile: TileName) -> Launch:
        if self._folder is not None:
            wanted = ("table", op_name, dtype, tile)
            (image,) = [i for i in self._images if (i.kind, i.op_name, i.dtype, i.tile) == wanted]
            return self.load(image)
        from dlo_export.plugins.kernels import launch  # noqa: PLC0415 - imports triton

        return lambda *tensors: launch(op_name, *tensors, dtype=dtype, tile_name=tile)


def correctness(
    evidence: Evidence, seconds: float, cubins: Path | None, library: Path | None, host: Path | None
) -> None:
    """Every way in processes of its own, all at once: nothing is timed meanwhile."""
    ways = {"Triton JIT": [["--jit", dtype, tile] for dtype in LARGEST_ERROR for tile in TILE_NAMES]}
    if cubins is not None:
        ways["cubin"] = [["--cubins", str(cubins)]]
    if library is not None and host is not None:
        by_host = ["--library", str(library), "--host", str(host)]
        ways["libdlo_plugins.so"] = [by_host]
        if sanitizer := shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
            ways["compute-sanitizer"] = [[*by_host, "--sanitizer", sanitizer]]
    for left_out in set(WAYS) - set(ways):
        evidence.row(left_out, left_out="not given, or not on this machine")
    processes = [
        Process(
            " ".join((way, *options[1:3])), "kernel_correctness", tuple(options), fields={"kind": "right", "way": way}
        )
        for way, commands in ways.items()
        for options in commands
    ]
    run_processes(evidence, processes, seconds, threads=2)


class Speed:
    """The card's ceilings, and the bars beside them.

    Args:
        evidence: Where rows go.
        kernels: What is timed.
        replays: Of each graph.
    """

    def __init__(self, evidence: Evidence, kernels: Kernels, replays: int) -> None:
        self.evidence, self.kernels, self.replays = evidence, kernels, replays
        self.copy, self.product = copy_rate("cuda", replays), product_rate(replays)
        evidence.row(
            "ceilings",
            copy_tb_s=round(self.copy / 1e12, 3),
            read_tb_s=round(read_rate(replays) / 1e12, 3),
            bf16_product_tflop_s=round(self.product / 1e12, 1),
            least_kernel_us=round(least_kernel(replays).median_us, 2),
        )

    def cublas(self, subject: Layer, rows: int) -> tuple[Timing, dict[str, Any]]:
        """The three products, weights as [in, out] or [out, in], whichever is faster."""
        straight = timed(subject.products(rows, transposed=False), self.replays, of=len(subject.weights))
        transposed = timed(subject.products(rows, transposed=True), self.replays, of=len(subject.weights))
        both = {"cublas_in_out_us": round(straight.median_us, 2), "cublas_out_in_us": round(transposed.median_us, 2)}
        return min(straight, transposed, key=lambda timing: timing.median_us), both

    def one_token(self, size: tuple[int, int], dtype: str, pair: Pair, origin: Origin, bars: bool) -> None:
        """Decode of one active token."""
        subject = layer(*size, tokens=1, active=1.0, dtype=dtype, copies=4)
        ours = timed(subject.both(*pair), self.replays, of=len(subject.weights))
        cublas, facts = self.cublas(subject, 1)
        rate = subject.weight_bytes / (ours.median_us * 1e-6)
        share, ratio = rate / self.copy, ours.median_us / cublas.median_us
        self.evidence.row(
            f"decode, one active token: {origin.what}",
            passed=share >= 0.85 and ratio <= 1.05 if bars else None,
            kind="one token",
            **origin.fields,
            hidden=size[0],
            intermediate=size[1],
            dtype=dtype,
            **ours.facts,
            **facts,
            tb_s=round(rate / 1e12, 3),
            share_of_copy=round(share, 3),
            least_share=0.85,
            times_cublas=round(ratio, 3),
            most_times_cublas=1.05,
        )

    def skipped(self, tokens: int, dtype: str, pair: Pair, origin: Origin) -> None:
        """Nothing active: 20 pairs in a graph."""
        subject = layer(*LARGE, tokens=tokens, active=0.0, dtype=dtype, copies=1)
        ours = timed(subject.both(*pair), self.replays, rounds=20, of=1)
        first = timed(subject.gate_up(pair[0]), self.replays, rounds=20)
        second = timed(subject.down(pair[1]), self.replays, rounds=20)
        self.evidence.row(
            f"skipped: {origin.what}",
            passed=ours.median_us <= 3.0 if tokens <= 16 else None,
            kind="skipped",
            **origin.fields,
            tokens=tokens,
            dtype=dtype,
            **ours.facts,
            most_us_allowed=3.0,
            gate_up_us=round(first.median_us, 2),
            down_us=round(second.median_us, 2),
        )

    def rows(self, tokens: int, active: float, pair: Pair, origin: Origin) -> None:
        """A share of the tokens active; half of them: the batch's bar up to 64 tokens, otherwise the prompt's."""
        subject = layer(*LARGE, tokens=tokens, active=active, dtype="bfloat16", copies=4)
        ours = timed(subject.both(*pair), self.replays, of=len(subject.weights))
        cublas, facts = self.cublas(subject, subject.active)
        ratio = ours.median_us / cublas.median_us
        most = 1.1 if tokens <= 64 else 1 / 0.7
        flops = 6 * subject.active * subject.hidden * subject.intermediate
        self.evidence.row(
            f"{'half' if active == 0.5 else 'all'} of {tokens} tokens active: {origin.what}",
            passed=ratio <= most if active == 0.5 else None,
            kind="some tokens",
            **origin.fields,
            tokens=tokens,
            active=subject.active,
            dtype="bfloat16",
            **ours.facts,
            **facts,
            times_cublas=round(ratio, 3),
            most_times_cublas=round(most, 3),
            tb_s=round(subject.weight_bytes / ours.median_us / 1e6, 3),
            tflop_s=round(flops / ours.median_us / 1e6, 1),
        )

    def sweep(self, op_name: str, tile: TileName, size: tuple[int, int], tokens: int, active: float) -> Image | None:
        """Times every candidate; returns the fastest that is right."""
        import torch  # noqa: PLC0415 - heavy

        subject = layer(*size, tokens=tokens, active=active, dtype="bfloat16", copies=4)
        decisions, nothing = subject.scale.clone(), torch.zeros_like(subject.scale)
        is_gate_up = op_name == "SkipGateUp"
        reference = _large_reference(subject, is_gate_up)
        moved = subject.weight_bytes * (2 if is_gate_up else 1) / 3
        flops = (4 if is_gate_up else 2) * subject.active * subject.hidden * subject.intermediate
        best: tuple[float, Image] | None = None
        for image in self.kernels.candidates(op_name, tile):
            with self.evidence.guard(f"candidate {image.file}", **image.facts):
                loaded = self.kernels.load(image)
                launches = subject.gate_up(loaded) if is_gate_up else subject.down(loaded)
                written = subject.gated if is_gate_up else subject.output
                written.view(torch.uint8).fill_(POISON)
                launches[0]()
                error = _large_error(subject, written, reference, is_gate_up)
                right = error <= LARGEST_ERROR["bfloat16"]
                timing = timed(launches, self.replays)
                subject.scale.copy_(nothing)
                skipped = timed(launches, self.replays, rounds=4)
                subject.scale.copy_(decisions)
                self.evidence.row(
                    "candidate",
                    passed=None if right else False,
                    **image.facts,
                    hidden=size[0],
                    tokens=tokens,
                    active=subject.active,
                    error=error,
                    **timing.facts,
                    tb_s=round(moved / timing.median_us / 1e6, 3),
                    tflop_s=round(flops / timing.median_us / 1e6, 1),
                    skipped_us=round(skipped.median_us, 2),
                )
                if right and (best is None or timing.median_us < best[0]):
                    best = (timing.median_us, image)
        return None if best is None else best[1]


def _large_reference(subject: Layer, is_gate_up: bool) -> Any:
    """What the active rows must be, float32 on the device: NumPy's definition in PyTorch's words."""
    import torch  # noqa: PLC0415 - heavy

    chosen = subject.scale[0] != 0
    gate, up, down = (weight.float() for weight in subject.weights[0])
    if is_gate_up:
        x = subject.x[0, chosen].float()
        return torch.nn.functional.silu(x @ gate) * (x @ up)
    branch = subject.gated[0, chosen].float() @ down
    return subject.residual[0, chosen].float() + subject.scale[0, chosen, None] * branch


def _large_error(subject: Layer, written: Any, reference: Any, is_gate_up: bool) -> float:
    """Of the row's largest output; infinite where a skipped token's row is not as it must be, or NaN came out."""
    import torch  # noqa: PLC0415 - heavy

    chosen = subject.scale[0] != 0
    kept = written[0, ~chosen]
    if is_gate_up:
        as_due = bool((kept.view(torch.uint8) == POISON).all())
    else:
        as_due = bool(torch.equal(kept, subject.residual[0, ~chosen]))
    largest = reference.abs().amax(dim=-1, keepdim=True)
    error = float(((written[0, chosen].float() - reference).abs() / largest).max())
    return error if as_due and not math.isnan(error) else float("inf")


def measure(evidence: Evidence, smoke: bool, options: argparse.Namespace) -> None:
    """Right first, then fast: the bars with the table's tiles, the candidates, the bars with the best of them."""
    with evidence.guard("correctness"):
        correctness(evidence, 30 if smoke else 60, options.cubins, options.library, options.host)
    kernels = Kernels(options.cubins)
    speed = Speed(evidence, kernels, replays=8 if smoke else 20)
    _bars(evidence, speed, lambda tokens: kernels.table("bfloat16", tokens), Origin(kernels.way, "table"))
    if options.cubins is not None:
        # What captured decode in PyTorch launches: another compiler's code, of tiles of its own.
        with evidence.guard("decode, one active token: Triton JIT"):
            compiled_here = Kernels(None).table("bfloat16", 1)
            for size in (LARGE, SMALL):
                speed.one_token(size, "bfloat16", compiled_here, Origin("Triton JIT", "table"), bars=False)
    if options.cubins is None or not evidence.fits("candidates", 8):
        return
    best: dict[TileName, Pair] = {}
    shapes: dict[TileName, tuple[int, float]] = {"decode": (16, 0.5), "prefill": (512, 0.5)}
    for tile, (tokens, active) in shapes.items():
        with evidence.guard(f"candidates, {tile}"):
            gate_up, down = (speed.sweep(op_name, tile, LARGE, tokens, active) for op_name in PLUGIN_OPS)
            if gate_up is not None and down is not None:
                best[tile] = kernels.load(gate_up), kernels.load(down)
                evidence.row(f"best candidates, {tile}", gate_up=gate_up.facts, down=down.facts)
            # Where a tile's programs go round the card once more, it is another one that is fastest.
            other, share = (SMALL, active) if tile == "decode" else (LARGE, 1.0)
            for op_name in PLUGIN_OPS:
                speed.sweep(op_name, tile, other, tokens, share)
    if len(best) == len(shapes):
        _bars(evidence, speed, lambda tokens: best[tile_for(tokens)], Origin("cubin", "best"))


def _bars(evidence: Evidence, speed: Speed, pair_for: Callable[[int], Pair], origin: Origin) -> None:
    """Every promise about speed, and what stands beside them."""
    with evidence.guard(f"decode, one active token: {origin.what}"):
        speed.one_token(LARGE, "bfloat16", pair_for(1), origin, bars=True)
        speed.one_token(SMALL, "bfloat16", pair_for(1), origin, bars=False)
    with evidence.guard(f"skipped: {origin.what}"):
        for tokens in (1, 16, 512):
            speed.skipped(tokens, "bfloat16", pair_for(tokens), origin)
    with evidence.guard(f"half of the tokens active: {origin.what}"):
        for tokens in (16, 512):
            speed.rows(tokens, 0.5, pair_for(tokens), origin)
        speed.rows(512, 1.0, pair_for(512), origin)
    if origin.tiles == "table":
        with evidence.guard(f"float16: {origin.what}"):
            speed.one_token(LARGE, "float16", speed.kernels.table("float16", 1), origin, bars=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--cubins", "--library", "--host"):
        own.add_argument(name, type=lambda text: Path(text).resolve())
    options, rest = own.parse_known_args(arguments)
    return run_part("kernels", __doc__, check, lambda evidence, smoke: measure(evidence, smoke, options), rest)


if __name__ == "__main__":
    raise SystemExit(main())
