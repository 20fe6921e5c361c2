"""The sizes the experiments come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dlo_export.checkpoints.errors import InputError


@dataclass(frozen=True)
class Form:
    """How large everything is.

    Attributes:
        toy: Make a tiny model in place instead of taking a trained one: it shows that the command works, and nothing
            about the methods.
        budget_s: Seconds that the command may take, where it is not told.
        training_share: Of the budget, what training runs may take; the rest is for measuring.
        tokens: To train each run on, at most.
        least_tokens: Fewer are not worth a run: rather leave runs of the main table out.
        probe_steps: Of each run that measures tokens per second.
        batches: Sequences of a step, rising; the fastest is taken (see `training_speed`).
        least_steps: Of a run of the main table, or a smaller batch is taken.
        sequence: Tokens of a sequence.
        dtype: Of training.
        compile: Compile layers in training, but for those of experts, whose shapes depend on the tokens.
        learning_rate: Of weights.
        router_learning_rate: Of routers, as a share of their weights' root mean square.
        selection: Of trained routers, as `TrainingSettings` has it.
        skip_weight: Of labels in their loss, likewise.
        distill_weight: Of the dense model before training in the loss of routed ones, beside the text's, likewise.
        curve_points: How often a run is measured on its way.
        held_out_tokens: Of each domain, in windows of `sequence` tokens.
        artefact_tokens: Of these, how many of each domain an artefact is measured on.
        calibration_tokens: To fit routers on, and to choose what is removed.
        greedy_tokens: To try removals on, greedily: a pass for each layer that is left, for each that is removed.
        tli_every: K of Transformer Layer Injection.
        target: Active rate of the deepened, routed model.
        targets: Active rates of the routed original.
        seeds: Of the trained routers.
        runs: Names of the training runs, by falling importance; none for all of `training_runs`, as they stand there.
        main_runs: So many of the first ones make the main table: it gets as many tokens as there is time for.
        packages: Train on installed packages besides the standard library.
        questions: Of each log-likelihood task.
        rounds: Blocks of each artefact's timing.
        prompt_tokens: Of the timed prefill.
        decode_tokens: Timed steps behind it.
    """

    toy: bool = False
    budget_s: float = 3600
    training_share: float = 0.6
    tokens: int = 400_000
    least_tokens: int = 16_384
    probe_steps: int = 3
    batches: tuple[int, ...] = (4,)
    least_steps: int = 20
    sequence: int = 512
    dtype: str = "bf16"
    compile: bool = False
    learning_rate: float = 3e-5
    router_learning_rate: float = 0.02
    selection: str = "threshold"
    skip_weight: float = 0.1
    distill_weight: float = 0.0
    curve_points: int = 4
    held_out_tokens: int = 2_048
    artefact_tokens: int = 2_048
    calibration_tokens: int = 16_384
    greedy_tokens: int = 1_024
    tli_every: tuple[int, ...] = (3, 5, 10)
    target: float = 0.8
    targets: tuple[float, ...] = (0.9, 0.8, 0.7)
    seeds: tuple[int, ...] = (0,)
    runs: tuple[str, ...] = ()
    main_runs: int = 11
    packages: bool = False
    questions: int = 200
    rounds: int = 7
    prompt_tokens: int = 128
    decode_tokens: int = 32


# What each claim needs comes first: a run that falls behind its time takes those behind it along.
_BY_WORTH = (
    "train-original",
    "train-deepened",
    "train-dlo",
    "train-dlo-cos-global",
    *(f"train-routed-{target}-seed-0" for target in ("0.80", "0.90", "0.70")),
    "train-distilled-0.90",
    "train-distilled-0.80",
    *(f"train-routed-{target}-seed-{seed}" for seed in (1, 2) for target in ("0.80", "0.90", "0.70")),
    "train-dlo-slower-routers",
    "train-llama-pro",
    "train-dus",
    "train-deepened-copies",
    "train-original-equal-flops",
    "train-llama-pro-equal-flops",
    "train-moe",
    "train-moe-equal-flops",
)

_QUICK = Form(
    toy=True,
    budget_s=180,
    tokens=4_096,
    least_tokens=1_024,
    batches=(2,),
    sequence=256,
    dtype="fp32",
    learning_rate=1e-3,
    curve_points=2,
    held_out_tokens=1_024,
    calibration_tokens=2_048,
    greedy_tokens=512,
    tli_every=(5,),
    targets=(0.9, 0.8),
    questions=20,
    rounds=3,
    prompt_tokens=64,
    decode_tokens=8,
)

FORMS: dict[str, Form] = {
    "quick": _QUICK,
    "hour": Form(),
    "gpu": Form(
        budget_s=600,
        training_share=0.7,
        tokens=1_600_000,
        least_tokens=250_000,
        probe_steps=6,
        batches=(32, 64),
        learning_rate=1e-4,
        selection="annealed",
        skip_weight=0.0,
        curve_points=2,
        held_out_tokens=8_192,
        greedy_tokens=2_048,
        seeds=(0, 1, 2),
        runs=_BY_WORTH,
        main_runs=16,
        packages=True,
        questions=300,
    ),
    # The quick form's sizes, and every run of the one for GPUs.
    "smoke": replace(
        _QUICK,
        budget_s=40,
        dtype="bf16",
        selection="annealed",
        skip_weight=0.0,
        curve_points=1,
        tli_every=Form.tli_every,
        targets=Form.targets,
        runs=(*_BY_WORTH[:9], "train-dlo-slower-routers", "train-moe"),
        main_runs=11,
    ),
}


def with_values(form: Form, words: Sequence[str]) -> Form:
    """The form with some values changed.

    Args:
        form: To change.
        words: NAME=VALUE each, several values with commas between them: numbers or words, as the form has them.

    Raises:
        InputError: It has no such value, or one of another kind.
    """
    changes: dict[str, Any] = {}
    names = [field.name for field in fields(form) if not isinstance(getattr(form, field.name), bool)]
    for word in words:
        name, _, text = word.partition("=")
        if name not in names:
            raise InputError(f"--set {word}: a form has no such number or word", hint=f"it has {', '.join(names)}")
        before = getattr(form, name)
        kind = type(before[0] if isinstance(before, tuple) and before else "" if isinstance(before, tuple) else before)
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError as err:
            raise InputError(f"--set {word}: expected {kind.__name__}", hint=f"the form has {before!r}") from err
        changes[name] = values if isinstance(before, tuple) else values[0]
    return replace(form, **changes)
