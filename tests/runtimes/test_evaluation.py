"""Evaluation against computations written out here with transformers alone, on PyTorch and on ONNX Runtime."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.evaluation.batches import score_segments
from dlo_export.runtimes.evaluation.encoding import Window
from dlo_export.runtimes.evaluation.errors import EvaluationError
from dlo_export.runtimes.evaluation.estimates import ratio_of_blocks, share
from dlo_export.runtimes.evaluation.evaluate import (
    Evaluation,
    EvaluationPlan,
    EvaluationSettings,
    evaluate,
    plan_evaluation,
)
from dlo_export.runtimes.evaluation.perplexity import measure_perplexity
from dlo_export.runtimes.evaluation.requests import read_task
from dlo_export.runtimes.evaluation.scorer import LogitsScorer, RunnerScorer, Segment
from dlo_export.runtimes.evaluation.texts import read_text
from dlo_export.runtimes.generation.tokenizer import Tokenizer
from dlo_export.runtimes.runner import StepResult
from dlo_export.runtimes.torch.scorer import TorchScorer
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

SEQUENCE, STRIDE = 40, 25
ROUTED = (True, False, True)
WORDS = ("layer", "token", "router", "a", "decoder", "skips", "the", "naïve")


class Place:
    """A routed checkpoint, its artefact, texts and a task."""

    def __init__(self, folder: Path) -> None:
        self.model = save_tiny_llama(folder / "model", vocab=BYTE_VOCABULARY, tokenizer=True, routed=ROUTED)
        self.artefact = folder / "artefact"
        export_model(ExportRequest(str(self.model), self.artefact, parity=False), Reporter())
        rng = np.random.default_rng(0)
        self.documents = [" ".join(rng.choice(WORDS, 30)) for _ in range(9)]
        self.texts = folder / "texts.jsonl"
        self.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.documents))
        self.questions: list[dict[str, Any]] = []
        for number in range(12):
            context = " ".join(rng.choice(WORDS, 5))
            choices = [" ".join(["", *rng.choice(WORDS, count)]) for count in (1, 2, 4)[: 3 - (number == 7)]]
            self.questions.append({"context": context, "choices": choices, "label": int(rng.integers(0, len(choices)))})
        self.tasks = folder / "choices.jsonl"
        lines = [
            {"doc_id": number, "context": each["context"], "continuation": choice, "label": each["label"]}
            for number, each in enumerate(self.questions)
            for choice in each["choices"]
        ]
        self.tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def model(place: Place) -> Any:
    return AutoModelForCausalLM.from_pretrained(place.model)


@pytest.fixture(scope="module")
def plan(place: Place) -> EvaluationPlan:
    settings = EvaluationSettings(context=128, sequence=SEQUENCE, stride=STRIDE, batch=None)
    return plan_evaluation(Tokenizer(place.artefact), [read_text(place.texts)], [read_task(place.tasks)], settings)


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def evaluation(request: pytest.FixtureRequest, place: Place, model: Any, plan: EvaluationPlan) -> Iterator[Evaluation]:
    if request.param == "torch":
        yield evaluate(TorchScorer(model), plan)
        return
    with open_artefact(place.artefact) as runner:
        yield evaluate(RunnerScorer(runner), plan)


@torch.inference_mode()
def losses_of(model: Any, ids: Sequence[int], start: int) -> np.ndarray:
    """Of the tokens from `start` on, one forward pass over all of them."""
    logits = model(torch.tensor([list(ids)])).logits[0, :-1].double()
    losses = -torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return losses[start - 1 :].numpy()


def test_perplexity_is_the_one_written_out_with_transformers(place: Place, model: Any, evaluation: Evaluation) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    sums, tokens, sizes = [], [], []
    for document in place.documents:
        ids = tokenizer.encode(document)
        # Windows as most evaluations slide them: each reads SEQUENCE tokens, and scores what no other did.
        scored, ends = 1, [SEQUENCE + 1]
        while ends[-1] < len(ids):
            ends.append(ends[-1] + STRIDE)
        losses = []
        for end in (min(end, len(ids)) for end in ends):
            window = ids[max(0, end - 1 - SEQUENCE) : end]
            losses += losses_of(model, window, len(window) - (end - scored)).tolist()
            scored = end
        assert len(losses) == len(ids) - 1
        sums.append(sum(losses))
        tokens.append(len(losses))
        sizes.append(len(document[1:].encode()))
    (measured,) = evaluation.perplexities
    assert measured.scored_tokens == sum(tokens)
    assert measured.nats_per_token.value == pytest.approx(sum(sums) / sum(tokens), rel=1e-6)
    assert measured.perplexity.value == pytest.approx(math.exp(sum(sums) / sum(tokens)), rel=1e-5)
    assert measured.bits_per_byte is not None
    assert measured.bits_per_byte.value == pytest.approx(sum(sums) / math.log(2) / sum(sizes), rel=1e-6)
    # Nine documents are enough to be the blocks of the standard error.
    assert measured.error_over == "documents"
    rests = [loss - count * sum(sums) / sum(tokens) for loss, count in zip(sums, tokens, strict=True)]
    error = math.sqrt(9 / 8 * sum(rest**2 for rest in rests)) / sum(tokens)
    assert measured.nats_per_token.standard_error == pytest.approx(error, rel=1e-4)
    assert measured.perplexity.standard_error == pytest.approx(error * measured.perplexity.value, rel=1e-4)


def test_accuracy_is_the_one_written_out_with_transformers(place: Place, model: Any, evaluation: Evaluation) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    chosen, by_character, gold_bits, gold_bytes = [], [], 0.0, 0
    for question in place.questions:
        context = tokenizer.encode(question["context"])
        likelihoods = [
            -losses_of(model, tokenizer.encode(question["context"] + choice), len(context)).sum()
            for choice in question["choices"]
        ]
        chosen.append(int(np.argmax(likelihoods)))
        normalised = [value / len(choice) for value, choice in zip(likelihoods, question["choices"], strict=True)]
        by_character.append(int(np.argmax(normalised)) == question["label"])
        gold_bits -= likelihoods[question["label"]] / math.log(2)
        gold_bytes += len(question["choices"][question["label"]].encode())
    (measured,) = evaluation.tasks
    right = [choice == question["label"] for choice, question in zip(chosen, place.questions, strict=True)]
    assert measured.chosen == tuple(chosen)
    assert 0 < sum(right) < 12
    assert measured.accuracy.value == sum(right) / 12
    assert measured.accuracy.standard_error == pytest.approx(math.sqrt(sum(right) * (12 - sum(right)) / 12**3))
    assert measured.accuracy_per_character is not None
    assert measured.accuracy_per_character.value == sum(by_character) / 12
    assert measured.gold_bits_per_byte.value == pytest.approx(gold_bits / gold_bytes, rel=1e-6)
    assert (measured.questions, measured.requests, measured.truncated) == (12, 35, 0)


def test_active_rates_are_the_routers_decisions_whatever_runs(model: Any, evaluation: Evaluation) -> None:
    (text,), (task,) = evaluation.plan.texts, evaluation.plan.tasks
    # Each segment, and from which token on it is read: what the choices of a question share is read once.
    windows = [(window.segment, 0) for window in text.windows]
    choices = [(each, each.start if i else 0) for segments in task.segments for i, each in enumerate(segments)]
    for result, segments in ((evaluation.perplexities[0], windows), (evaluation.tasks[0], choices)):
        active = {0: 0, 2: 0}
        for segment, start in segments:
            with torch.inference_mode():
                scores = model(torch.from_numpy(segment.ids[None, :-1])).router_scores
            for layer in active:
                active[layer] += int((scores[layer][0, start:] > 0.5).sum())
        assert result.read_tokens == sum(segment.read - start for segment, start in segments)
        assert result.active_rate == {layer: count / result.read_tokens for layer, count in active.items()}


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "torch, whole layers skipped"])
def test_scores_are_the_same_whether_contexts_are_shared_or_not(
    place: Place, model: Any, plan: EvaluationPlan, kind: str, tmp_path: Path
) -> None:
    if kind == "torch, whole layers skipped":
        folder = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, routed=ROUTED, model_type="llama_dlo")
        model = AutoModelForCausalLM.from_pretrained(folder)
    with open_artefact(place.artefact, scores=False) as runner:
        scorer = RunnerScorer(runner) if kind == "onnxruntime" else TorchScorer(model)
        segments = [segment for choices in plan.tasks[0].segments for segment in choices]
        # A continuation of one token: nothing is left to be read behind the context.
        segments += [Segment(segments[0].ids[: segments[0].start + 1], segments[0].start)] * 2
        shared = score_segments(scorer, segments, share_contexts=True)
        alone = score_segments(scorer, segments, batch=1)
        together = score_segments(scorer, segments, batch=5)
    assert shared.read < alone.read
    for first, second, third in zip(shared.scores, alone.scores, together.scores, strict=True):
        np.testing.assert_allclose(first.losses, second.losses, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(third.losses, second.losses, rtol=1e-5, atol=1e-5)
        assert np.array_equal(first.most_likely, second.most_likely)


def test_a_single_continuation_is_right_when_the_model_would_generate_it(
    place: Place, model: Any, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(place.artefact)
    context = "a token skips the"
    ids = tokenizer.encode(context)
    with torch.inference_mode():
        generated = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0]
    segments = [Segment(generated.numpy(), len(ids)), Segment(np.array([*ids, 5, 6, 7]), len(ids))]
    scores = score_segments(TorchScorer(model), segments).scores
    assert [bool(each.most_likely.all()) for each in scores] == [True, False]
    (tmp_path / "one.jsonl").write_text(json.dumps({"context": context, "continuation": " layer"}))
    settings = EvaluationSettings()
    result = evaluate(TorchScorer(model), plan_evaluation(tokenizer, [], [read_task(tmp_path / "one.jsonl")], settings))
    (measured,) = result.tasks
    assert (measured.chosen, measured.accuracy.value) == ((-1,), 0.0)
    assert measured.accuracy_per_character is measured.accuracy_per_byte is None


def test_anything_that_answers_logits_is_measured() -> None:
    def uniform(ids: np.ndarray) -> StepResult:
        return StepResult(np.zeros((*ids.shape, 4), np.float32), {0: (ids % 2).astype(np.float32)}, {})

    windows = [Window(Segment(np.arange(8) % 4, 1), 0), Window(Segment(np.arange(5) % 4, 3), 0)]
    measured = measure_perplexity(LogitsScorer(uniform), windows)
    assert measured.perplexity.value == pytest.approx(4.0)
    assert (measured.scored_tokens, measured.read_tokens) == (9, 11)
    assert measured.active_rate == {0: 5 / 11}
    assert (measured.error_over, measured.bits_per_byte) == ("windows", None)
    assert measured.nats_per_token.standard_error == pytest.approx(0)
    assert measure_perplexity(LogitsScorer(uniform), windows[:1]).perplexity.standard_error is None


def test_evaluation_ends_when_a_likelihood_is_no_number() -> None:
    def broken(ids: np.ndarray) -> StepResult:
        return StepResult(np.full((*ids.shape, 4), np.nan, np.float32), {}, {})

    with pytest.raises(EvaluationError, match="broken: gives a token no finite likelihood"):
        measure_perplexity(LogitsScorer(broken, "broken"), [Window(Segment(np.zeros(4, np.int64), 1), 0)])


def test_perplexity_is_refused_when_nothing_can_be_predicted() -> None:
    with pytest.raises(EvaluationError, match="there is no token to predict"):
        measure_perplexity(LogitsScorer(lambda _ids: pytest.fail("was run")), [])


def test_a_token_is_refused_when_the_model_has_no_such_one(model: Any) -> None:
    with pytest.raises(StepError, match=f"got token {BYTE_VOCABULARY}, the model has {BYTE_VOCABULARY}"):
        TorchScorer(model).score([Segment(np.array([1, BYTE_VOCABULARY]), 1)])


def test_fork_is_refused_unless_there_is_one_sequence(place: Place) -> None:
    with open_artefact(place.artefact, scores=False) as runner:
        with pytest.raises(StepError, match="was asked to fork no sequences"):
            runner.fork(2)
        runner.reset(2)
        with pytest.raises(StepError, match="was asked to fork 2 sequences"):
            runner.fork(2)


def test_standard_errors_are_those_of_the_textbook() -> None:
    values = [1.0, 4.0, 2.0, 7.0]
    estimate = ratio_of_blocks(values, [1, 1, 1, 1])
    assert estimate.value == 3.5
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert ratio_of_blocks([3.0, 6.0], [1, 2]).standard_error == pytest.approx(0)
    assert share([True, False, True, True]).standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
