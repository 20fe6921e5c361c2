"""What gpu_check found out about each artefact, and whether that is good."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.common.measure import print_report, versions
from benchmarks.engines.gpu_latency import Latency, latency_table, measure_latency
from benchmarks.engines.gpu_skip_proof import SkipProof, skip_proof
from benchmarks.engines.gpu_subject import Subject
from dlo_export.runtimes import bench
from dlo_export.runtimes.parity.cases import Case, parity_cases
from dlo_export.runtimes.parity.compare import Candidate, compare
from dlo_export.runtimes.parity.report import ParityReport

GREEDY_PROMPTS, GREEDY_TOKENS = (24, 15), 32


@dataclasses.dataclass(frozen=True)
class Findings:
    """About one artefact.

    Attributes:
        name: Of the artefact.
        parity: Against ONNX Runtime on its model.onnx.
        left_out: Parity cases that do not fit the engine's limits.
        proofs: Per phase; none where nothing is routed.
        latencies: Per skip rate.
    """

    name: str
    parity: ParityReport
    left_out: tuple[str, ...]
    proofs: tuple[SkipProof, ...]
    latencies: tuple[Latency, ...]

    @property
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """FAIL unless parity was run and holds; a proof that could not be made fails nothing, one that fails does."""
        proven = all(proof.verdict != "FAIL" for proof in self.proofs)
        return "PASS" if self.parity.verdict in ("PASS", "AMBIGUOUS") and proven else "FAIL"

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.name}: {self.verdict}", *(f"  {line}" for line in self.parity.summary().splitlines())]
        if self.left_out:
            lines.append(f"  left out of parity, too large for the engine: {', '.join(self.left_out)}")
        lines += [f"  skipping in {proof.phase}: {proof.verdict}, {proof.reason}" for proof in self.proofs]
        graphs = dict.fromkeys(latency.cuda_graph for latency in self.latencies)
        return [*lines, *(f"  CUDA graph of decode: {graph}" for graph in graphs)]

    def to_json(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            "artefact": self.name,
            "verdict": self.verdict,
            "parity": self.parity.to_json(),
            "left_out": list(self.left_out),
            "skipping": [proof.to_json() for proof in self.proofs],
            "latency": [latency.to_json() for latency in self.latencies],
        }


def examine(subject: Subject, workload: bench.Workload) -> Findings:
    """Parity, the proof that skipping skips, latency: one after the other, one build open at a time."""
    parity, left_out = check_parity(subject)
    proofs = []
    if subject.layer_seconds is not None:
        with subject.open_reference() as reference:
            routed = reference.routed_layers
        proofs = [
            skip_proof(
                phase, subject.layer_seconds(phase, 1), subject.layer_seconds(phase, 0), routed, subject.mlp_share
            )
            for phase in ("decode", "prefill")
        ]
    return Findings(subject.name, parity, left_out, tuple(proofs), tuple(measure_latency(subject, workload)))


def check_parity(subject: Subject) -> tuple[ParityReport, tuple[str, ...]]:
    """Compares engines with their reference.

    Returns:
        The report, and the names of cases that do not fit the engines.
    """
    if subject.last_logits:
        return ParityReport.not_run("the engine keeps the last token's logits only: export without it to check"), ()
    cases = parity_cases(subject.vocab_size, routed=subject.open_forced is not None)
    fitting = [case for case in cases if _fits(case, subject)]
    rng = np.random.default_rng(0)
    longest = max(GREEDY_PROMPTS) + GREEDY_TOKENS
    prompts = [rng.integers(0, subject.vocab_size, tokens).tolist() for tokens in GREEDY_PROMPTS]
    limits = subject.limits
    # Refed tokens are one step of all that were generated.
    refed = longest <= min(limits.max_cache, limits.max_sequence or longest)
    left_out = [case.name for case in cases if case not in fitting] + ([] if refed else ["greedy tokens"])
    if not fitting:
        return ParityReport.not_run("the engine is too small for every case"), tuple(left_out)
    with subject.open_reference() as reference:
        report = compare(
            reference,
            [Candidate("engine", subject.open_free, subject.open_forced)],
            fitting,
            dtype=subject.dtype,
            greedy_prompts=prompts[: limits.max_batch or None] if refed else (),
            greedy_tokens=GREEDY_TOKENS,
        )
    return report, tuple(left_out)


def _fits(case: Case, subject: Subject) -> bool:
    limits = subject.limits
    longest = max(feed.input_ids.shape[1] for feed in case.feeds)
    return (
        case.batch <= (limits.max_batch or case.batch)
        and longest <= (limits.max_sequence or longest)
        and sum(feed.input_ids.shape[1] for feed in case.feeds) <= limits.max_cache
    )


def print_findings(title: str, findings: Sequence[Findings], result: dict[str, Any]) -> None:
    """Prints findings for people, the table of latencies, and everything as one JSON line.

    Args:
        title: Of the table.
        findings: Of every artefact.
        result: What else the JSON line says.
    """
    for found in findings:
        print("\n".join(found.lines()) + "\n")
    header, rows = latency_table([latency for found in findings for latency in found.latencies])
    artefacts = [found.to_json() for found in findings]
    print_report(title, header, rows, {**result, "artefacts": artefacts, "versions": versions("onnxruntime", "numpy")})
