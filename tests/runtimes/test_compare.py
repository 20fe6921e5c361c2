from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.parity.cases import Case, Feed, parity_cases
from dlo_export.runtimes.parity.compare import Candidate, OtherPrecision, compare
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.tolerances import TOLERANCES
from dlo_export.runtimes.runner import Int64Array, StepResult
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.graphs import DATA, Builds, routed_builds

VOCAB = 131
PROMPTS = [[5, 17, 90, 3], [44, 8]]
CASES = parity_cases(VOCAB, routed=True)
NATURAL = [case.name for case in CASES if case.forcing is None]


def _model(config: dict[str, Any] | None = None, edit: Callable[[dict[str, np.ndarray]], None] | None = None) -> Any:
    values = json.loads((DATA / "reference_mlp_routed" / "config.json").read_text()) | (config or {})
    tensors = load_file(DATA / "reference_mlp_routed" / "model.safetensors")
    if edit is not None:
        edit(tensors)
    return llama_dlo_from_tensors(values, {name: ArrayTensor(array) for name, array in tensors.items()})


def _torch_candidate(model: Any) -> Candidate:
    def opened() -> TorchRunner:
        return TorchRunner(model)

    return Candidate("torch", opened, opened, opened, opened)


@pytest.fixture(scope="module")
def reference() -> Iterator[TorchRunner]:
    with TorchRunner(_model(), masked=True) as runner:
        yield runner


def _compare(
    reference: TorchRunner,
    candidate: Candidate,
    cases: tuple[Case, ...] = CASES,
    dtype: str = "fp32",
    other: Any = None,
) -> ParityReport:
    another = None if other is None else OtherPrecision.of_pytorch(dtype, lambda _: TorchRunner(other, masked=True))
    return compare(
        reference,
        [candidate],
        cases,
        dtype=dtype,
        greedy_prompts=PROMPTS,
        greedy_tokens=8,
        other=another,
    )


def _onnx_candidate(name: str, builds: Builds) -> Candidate:
    return Candidate(
        name,
        lambda: OnnxRuntimeRunner(builds.released, threads=1),
        lambda: OnnxRuntimeRunner(builds.forced, weights_folder=builds.folder, threads=1),
    )


def test_parity_passes_when_masked_and_compact_graphs_are_right(
    reference: TorchRunner, builds: Builds, tmp_path_factory: pytest.TempPathFactory
) -> None:
    masked = routed_builds(DATA / "reference_mlp_routed", tmp_path_factory.mktemp("masked"), "masked")
    report = compare(
        reference,
        [_onnx_candidate("masked", masked), _onnx_candidate("compact", builds)],
        CASES,
        dtype="fp32",
        greedy_prompts=PROMPTS,
    )
    assert report, report.summary()
    assert [(case.candidate, case.case) for case in report.cases] == [
        (name, case) for name in ("masked", "compact") for case in [*(c.name for c in CASES), "greedy tokens, refed"]
    ]
    assert all(case.logits.compared and case.decisions and not case.flips for case in report.cases)
    assert {case.case for case in report.cases if case.free_logits} == {*NATURAL, "greedy tokens, refed"}
    assert [run.identical for run in report.greedy] == [64, 64]
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["verdict"] == "PASS"
    assert len(document["cases"]) == 16
    assert report.summary().startswith("parity PASS")


def test_builds_that_explain_a_difference_stay_closed_when_there_is_none(reference: TorchRunner) -> None:
    def unasked(*_: str) -> TorchRunner:
        raise AssertionError("opened, though nothing differs")

    candidate = dataclasses.replace(_torch_candidate(_model()), open_streams=unasked, open_shown=unasked)
    other = OtherPrecision.of_pytorch("fp32", unasked)
    assert compare(reference, [candidate], CASES[:1], dtype="fp32", other=other)


def test_parity_passes_when_nothing_is_routed() -> None:
    dense = _model({"is_dlo": False}, lambda tensors: [tensors.pop(name) for name in [*tensors] if "routers" in name])
    with TorchRunner(dense) as reference:
        report = compare(
            reference,
            [Candidate("dense", lambda: TorchRunner(dense))],
            parity_cases(VOCAB, routed=False),
            dtype="fp32",
            greedy_prompts=PROMPTS,
        )
    assert report, report.summary()
    assert len(report.cases) == 5
    assert not any(case.decisions for case in report.cases)


@pytest.mark.parametrize("layer", [0, 2])
def test_parity_names_the_first_diverging_layer_when_a_weight_is_wrong(reference: TorchRunner, layer: int) -> None:
    def transpose_gate(tensors: dict[str, np.ndarray]) -> None:
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    report = _compare(reference, _torch_candidate(_model(edit=transpose_gate)))
    assert report.verdict == "FAIL"
    assert {case.first_diverging_layer for case in report.cases} == {layer}
    assert f"first diverging layer {layer}" in report.summary()
    assert report.greedy[0].judge().verdict != "PASS"


def test_parity_blames_norm_or_head_when_all_layers_agree(reference: TorchRunner) -> None:
    def scale_norm(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] *= 1.001

    report = _compare(reference, _torch_candidate(_model(edit=scale_norm)))
    assert report.verdict == "FAIL"
    assert "final norm or the head" in report.summary()


def test_parity_fails_when_the_norms_epsilon_is_wrong(reference: TorchRunner) -> None:
    report = _compare(reference, _torch_candidate(_model({"rms_norm_eps": 1e-6})))
    assert report.verdict == "FAIL"


class _PaddingBlind(OnnxRuntimeRunner):
    """Attends to padding."""

    def step(
        self, input_ids: Int64Array, attention_mask: Int64Array, position_ids: Int64Array, **options: Any
    ) -> StepResult:
        return super().step(input_ids, np.ones_like(attention_mask), position_ids, **options)


def test_parity_fails_in_padded_cases_only_when_the_mask_is_ignored(reference: TorchRunner, builds: Builds) -> None:
    candidate = Candidate(
        "blind",
        lambda: _PaddingBlind(builds.released, threads=1),
        lambda: _PaddingBlind(builds.forced, weights_folder=builds.folder, threads=1),
    )
    report = _compare(reference, candidate)
    passed = [case.case for case in report.cases if case.judge(TOLERANCES["fp32"]).verdict == "PASS"]
    assert passed == ["prefill", "chunk and decode with a cache"]


def test_parity_fails_when_decisions_differ_by_more_than_rounding(reference: TorchRunner) -> None:
    def negate_router(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.routers.1.weight"] *= -1

    report = _compare(reference, _torch_candidate(_model(edit=negate_router)))
    assert report.verdict == "FAIL"
    # Scores also scale the branch, a little: logits differ too, but the forced cases stay comparable.
    flips = [flip for case in report.cases for flip in case.flips]
    assert {flip.layer for flip in flips} == {1}
    assert max(flip.margin for flip in flips) > 0.01


ROUTED = (0, 1, 3)
RIGHT = {layer: f"scores = Identity (s{layer})" for layer in ROUTED}


def _with_scores(model: bytes, shown: dict[int, str]) -> bytes:
    """A graph whose outputs of scores are others: by layer, made of `s0`, `s1`, `s3`; none are left out."""
    proto = onnx.load_from_string(model)
    outputs = {f"router_scores.{layer}": f"s{layer}" for layer in ROUTED}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [outputs.get(name, name) for name in names]
    for layer, name in zip(ROUTED, outputs, strict=True):
        (value,) = (value for value in proto.graph.output if value.name == name)
        if layer not in shown:
            proto.graph.output.remove(value)
            continue
        inputs = "float[b, t] s0, float[b, t] s1, float[b, t] s3, float half"
        for node in onnx.parser.parse_graph(f"g ({inputs}) => (float[b, t] scores) {{ {shown[layer]} }}").node:
            node.output[:] = [name if output == "scores" else output for output in node.output]
            proto.graph.node.append(node)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("shown", "flips"),
    [
        ({**RIGHT, 1: "sum = Add (s1, half) scores = Mul (sum, half)"}, False),
        ({**RIGHT, 0: RIGHT[1], 1: RIGHT[0]}, True),
    ],
    ids=["halved about the threshold", "of another layer"],
)
def test_parity_fails_when_scores_are_shown_that_are_not_the_routers(
    reference: TorchRunner, builds: Builds, shown: dict[int, str], flips: bool
) -> None:
    wrong = _with_scores(builds.forced, shown)
    candidate = dataclasses.replace(
        _onnx_candidate("wrong", builds),
        open_forced=lambda: OnnxRuntimeRunner(wrong, weights_folder=builds.folder, threads=1),
    )
    report = _compare(reference, candidate)
    assert report.verdict == "FAIL", report.summary()
    assert any(case.flips for case in report.cases) == flips
    if not flips:
        reasons = [case.judge(TOLERANCES["fp32"]).reason for case in report.cases]
        assert all(reason.startswith("scores of routers differ: layer 1 by median") for reason in reasons), reasons


@pytest.mark.parametrize("shown", [{}, {0: RIGHT[0]}], ids=["none", "one layer's"])
def test_report_says_so_when_scores_are_not_shown(
    reference: TorchRunner, builds: Builds, shown: dict[int, str]
) -> None:
    silent = _with_scores(builds.forced, shown)
    candidate = dataclasses.replace(
        _onnx_candidate("silent", builds),
        open_forced=lambda: OnnxRuntimeRunner(silent, weights_folder=builds.folder, threads=1),
    )
    report = _compare(reference, candidate)
    assert report, report.summary()
    hidden = tuple(layer for layer in ROUTED if layer not in shown)
    assert all(case.scores.not_shown == hidden for case in report.cases)
    assert {case.decisions > 0 for case in report.cases} == {bool(shown)}, [(c.case, c.decisions) for c in report.cases]
    said = f"scores of layers {', '.join(map(str, hidden))} not shown: their routers were not compared"
    assert report.summary().count(said) == len(report.cases)


def _nudged_router(score_logit: float) -> Callable[[dict[str, np.ndarray]], None]:
    """Moves router 0 so that the prefill's last token has a given logit; layer 0 sees embeddings, which are known."""

    def nudge(tensors: dict[str, np.ndarray]) -> None:
        x = tensors["model.embed_tokens.weight"][CASES[0].feeds[0].input_ids[0, -1]].astype(np.float64)
        weight = tensors["model.routers.0.weight"].astype(np.float64)
        weight += (score_logit - weight @ x) * x / (x @ x)
        tensors["model.routers.0.weight"] = weight.astype(np.float32)

    return nudge


@pytest.mark.parametrize("measured", [False, True])
def test_parity_is_ambiguous_when_a_near_tie_flipped_that_rounding_does_not_flip(measured: bool) -> None:
    nudged = _nudged_router(1e-5)
    other = _model(edit=nudged).double() if measured else None
    with TorchRunner(_model(edit=nudged), masked=True) as reference:
        report = _compare(reference, _torch_candidate(_model(edit=_nudged_router(-1e-5))), other=other)
    assert report.verdict == "AMBIGUOUS", report.summary()
    assert not report
    flipped = next(case for case in report.cases if case.case == "prefill")
    assert [(flip.layer, flip.row, flip.position) for flip in flipped.flips] == [(0, 0, 31)]
    assert flipped.flips[0].margin < 1e-5
    assert "near-ties flipped: layer 0 token 31" in report.summary()
    assert ("its own fp32 is off float64" in report.summary()) == measured


def test_parity_passes_when_sixteen_bits_flip_near_ties() -> None:
    nudged = _nudged_router(-1e-6)
    rounded, other = (_model(edit=nudged).to(torch.bfloat16) for _ in range(2))
    with TorchRunner(_model(edit=nudged), masked=True) as reference:
        report = _compare(reference, _torch_candidate(rounded), dtype="bf16", other=other)
        assert report.verdict == "PASS", report.summary()
        flipped = next(case for case in report.cases if case.case == "prefill")
        assert (0, 31) in [(flip.layer, flip.position) for flip in flipped.flips]
        assert "near-ties flipped: layer 0 token 31" in report.summary()
        # The released graph decides likewise, but makes something else of it.
        broken = _model(edit=nudged).to(torch.bfloat16)
        with torch.no_grad():
            broken.model.layers[0].mlp.down_proj.weight *= -1
        candidate = dataclasses.replace(_torch_candidate(rounded), open_free=_torch_candidate(broken).open_free)
        report = _compare(reference, candidate, dtype="bf16", other=other)
    assert report.verdict == "FAIL", report.summary()
    flipped = next(case for case in report.cases if case.case == "prefill")
    assert "under the decisions that its own routers took" in flipped.judge(TOLERANCES["bf16"]).reason


def test_parity_is_ambiguous_when_sixteen_bits_flip_near_ties_of_routers_that_are_off(reference: TorchRunner) -> None:
    def widen(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if "routers" in name]:
            tensors[name] = tensors[name] * np.float32(1.06)

    wide, other = _model(edit=widen).to(torch.bfloat16), _model().to(torch.bfloat16)
    report = _compare(reference, _torch_candidate(wide), dtype="bf16", other=other)
    assert report.verdict == "AMBIGUOUS", report.summary()
    (case,) = (case for case in report.cases if case.flips)
    assert case.own_error is not None
    assert case.own_error.compared == "PyTorch's own bf16 is off its fp32"
    assert case.scores.mean > 2 * case.own_error.score_mean
    assert "scores are off by mean" in case.judge(TOLERANCES["bf16"]).reason


@pytest.mark.parametrize(("measured", "verdict"), [(True, "PASS"), (False, "AMBIGUOUS")])
def test_other_greedy_tokens_pass_when_rounding_of_the_reference_explains_them(measured: bool, verdict: str) -> None:
    def twins(times: float) -> Callable[[dict[str, np.ndarray]], None]:
        def edit(tensors: dict[str, np.ndarray]) -> None:
            head = tensors["lm_head.weight"]
            head[1::2] = head[:-1:2] * np.float32(times)

        return edit

    other = _model(edit=twins(1.0)).double() if measured else None
    with TorchRunner(_model(edit=twins(1.0)), masked=True) as reference:  # takes the first of equal tokens
        candidate = _torch_candidate(_model(edit=twins(1 + 2**-20)))
        report = _compare(reference, candidate, CASES[:1], other=other)
    (greedy,) = report.greedy
    assert greedy.differences
    assert all(difference.gap == 0 < difference.error for difference in greedy.differences)
    assert (greedy.judge().verdict, report.verdict) == (verdict, verdict), report.summary()
    for difference in greedy.differences:
        assert (0 < difference.rounding < 1e-4) if measured else difference.rounding is None


def test_own_errors_are_measured_when_no_tokens_are_generated(reference: TorchRunner) -> None:
    candidate = _torch_candidate(_model({"rms_norm_eps": 1e-4}))
    other = OtherPrecision.of_pytorch("fp32", lambda _: TorchRunner(_model().double(), masked=True))
    report = compare(reference, [candidate], CASES[:1], dtype="fp32", other=other)
    (case,) = report.cases
    assert case.own_error is not None
    assert report.verdict == "FAIL"


def test_parity_fails_when_the_released_graph_is_another_than_the_forced_one(reference: TorchRunner) -> None:
    other = _torch_candidate(_model(edit=lambda tensors: tensors["model.norm.weight"].__imul__(-1)))
    good = _torch_candidate(_model())
    report = _compare(reference, dataclasses.replace(good, open_free=other.open_free))
    assert report.verdict == "FAIL"
    failed = [case.case for case in report.cases if case.judge(TOLERANCES["fp32"]).verdict == "FAIL"]
    assert failed == [*NATURAL, "greedy tokens, refed"]
    assert report.greedy[0].judge().verdict == "FAIL"


def test_parity_fails_and_stays_json_when_logits_are_not_finite(reference: TorchRunner) -> None:
    model = _model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    report = _compare(reference, _torch_candidate(model))
    assert report.verdict == "FAIL"
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["cases"][0]["logits"]["largest"] is None
    assert "logits are not finite behind 0 new tokens" in report.summary()


def test_parity_fails_when_nothing_is_compared(reference: TorchRunner) -> None:
    candidate = _torch_candidate(_model())
    nothing = compare(reference, [candidate], [], dtype="fp32")
    assert nothing.verdict == "FAIL"
    assert "nothing was compared" in nothing.summary()
    ids = np.zeros((1, 3), np.int64)
    padding = compare(reference, [candidate], [Case("padding", (Feed(ids, ids, ids),))], dtype="fp32")
    assert padding.verdict == "FAIL"
    assert "nothing was compared" in padding.summary()


def test_parity_raises_when_the_vocabularies_differ(reference: TorchRunner) -> None:
    def widen(tensors: dict[str, np.ndarray]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])

    with pytest.raises(RuntimeInputError, match=r"\[1, 32, 132\].*\[1, 32, 131\]"):
        _compare(reference, _torch_candidate(_model({"vocab_size": 132}, widen)))


def test_parity_fails_when_logits_stop_being_finite_in_the_middle_of_greedy_tokens(reference: TorchRunner) -> None:
    """The step that breaks is fed nothing that the compared cases feed: only the generation sees it."""

    class BreaksLater(TorchRunner):
        def step(self, input_ids: np.ndarray, *inputs: np.ndarray, **options: object) -> StepResult:
            result = super().step(input_ids, *inputs, **options)
            self.generated = getattr(self, "generated", 0) + bool(options.get("last_logits"))
            if options.get("last_logits") and self.generated == 3:
                result.logits[:] = np.nan
            return result

    candidate = Candidate("late", lambda: BreaksLater(_model(), masked=True))
    report = compare(reference, [candidate], CASES, dtype="fp32", greedy_prompts=PROMPTS)
    assert report.verdict == "FAIL"
    assert report.greedy[0].not_finite
    assert "logits are not finite behind 2 new tokens" in report.summary()


@pytest.mark.parametrize("last", ["reference", "candidate"])
def test_parity_compares_and_places_the_logits_that_both_show(last: str) -> None:
    class WrongLater(TorchRunner):
        def step(self, input_ids: np.ndarray, *inputs: np.ndarray, **options: object) -> StepResult:
            result = super().step(input_ids, *inputs, **options)
            self.fed = (0 if self._past == input_ids.shape[1] else self.fed) + 1
            if self.fed == 3:
                result.logits[:] += 100
            return result

    case = next(case for case in CASES if case.name == "chunk and decode with a cache")  # 24, 4, and four tokens
    with TorchRunner(_model(), masked=True) as reference:

        def opened(kind: type[TorchRunner]) -> TorchRunner:
            runner = kind(_model(), masked=True)
            runner.last_logits_only = last == "candidate"
            return runner

        reference.last_logits_only = last == "reference"
        candidates = [Candidate(kind.__name__, lambda kind=kind: opened(kind)) for kind in (TorchRunner, WrongLater)]
        right = compare(reference, candidates[:1], [case], dtype="fp32", greedy_prompts=PROMPTS, greedy_tokens=4)
        wrong = compare(reference, candidates[1:], [case], dtype="fp32")
    assert right, right.summary()
    assert right.cases[0].logits.compared == 6 * VOCAB
    assert right.greedy[0].identical == 8
    assert (wrong.verdict, wrong.cases[0].logits.position) == ("FAIL", 28)
