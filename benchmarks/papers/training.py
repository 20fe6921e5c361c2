"""The training runs: what they start from, what they cost, how they end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.papers.experiment import Experiment
from benchmarks.papers.flops import training_flops
from benchmarks.papers.forms import Form
from benchmarks.papers.run_names import ORIGINAL
from benchmarks.papers.subjects import deeper, dus_plan, mixtures, saved_model
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.modeling.calibration.evaluation import with_routers
from dlo_export.modeling.identity_layers import identity_layers
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.errors import TrainingDivergedError
from dlo_export.modeling.training.parameters import choose_parameters
from dlo_export.modeling.training.reports import StepReport
from dlo_export.modeling.training.router_distillation import DistillationSettings
from dlo_export.modeling.training.run import TrainingResult, train_model
from dlo_export.modeling.training.run_folder import LOG_NAME, RunFolder
from dlo_export.modeling.training.settings import TrainingSettings

FLOPS_NAME = "flops.json"
_REFERENCE = "dlo"  # whose FLOPs the runs of equal FLOPs have
_WORTH_A_LARGER_BATCH = 1.1  # times the tokens per second
_SOFT_SHARE = 0.75  # of the steps in which distilled routers' gates harden
_SLOWER = 0.5  # times the routers' rate: what they were fitted to says more about text unlike what is learned
_LABELS_WEIGHT = 0.1
MakeDense = Callable[[Experiment], LlamaDloForCausalLM]


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A model to train.

    Attributes:
        kind: Runs of one kind have the same shapes, and learn the same.
        dense: Makes the model as it is without routers.
        suffix: What tells it from others of its kind.
        mode: What learns, see `TrainingSettings`.
        target: Share of all MLPs that are to run; None for a dense model.
        distilled: Towards the dense model's next tokens instead of the text's.
        seed: Of the order of the data.
        kept: Later pieces need the model; that of other runs that skip stays until it was compared.
        after: The run whose model this one starts from.
        router_rate: Times the form's.
        labelled: Routers learn from DLO's labels too, those of similarity pooled over layers (cos-global).
        equal_flops: Goes on until it has cost as much as the deepened, routed model.
    """

    kind: str
    dense: MakeDense
    suffix: str = ""
    mode: str = "full"
    target: float | None = None
    distilled: bool = False
    seed: int = 0
    kept: bool = False
    after: str | None = None
    router_rate: float = 1.0
    labelled: bool = False
    equal_flops: bool = False

    @property
    def name(self) -> str:
        """Of its result and its model."""
        return f"train-{self.kind}{self.suffix}"

    @property
    def compared(self) -> bool:
        """Whether it is compared with other ways to skip as much."""
        return self.kind in ("routed", "distilled")

    def model(self, experiment: Experiment) -> LlamaDloForCausalLM:
        """The model as training starts."""
        dense = self.dense(experiment)
        if self.target is None:
            return dense
        source = self.after or f"{dense.config.num_hidden_layers} layers"
        return routed_start(dense, source, experiment, self.target)


def training_runs(experiment: Experiment) -> list[TrainingRun]:
    """The form's runs, by falling importance."""
    form, by_name = experiment.form, {run.name: run for run in _every_run(experiment)}
    # Where the form's own routers learn from labels, a run that has them learn from labels only repeats another.
    others = [name for name, run in by_name.items() if not (run.labelled and form.skip_weight)]
    return [by_name[name] for name in form.runs or others]


def _every_run(experiment: Experiment) -> list[TrainingRun]:
    """All there are, by falling importance.

    DLO's interleaving with zeros and TLI's injection with zero_out make the same model here, so one dense run stands
    for both. Routers are compared with other ways to skip on the original layers: in a deepened model, the injected
    layers add next to nothing at first, and whoever skips them skips for nothing.
    """
    form, layers = experiment.form, experiment.base.layers
    interleaved, copied = (
        placements("interleave", layers, target_layers=deeper(layers), init=init) for init in ("zero_out", "copy")
    )
    mixture, *_ = mixtures().values()
    first, *others = form.seeds
    targets = sorted(form.targets, key=lambda target: abs(target - form.target))

    def original(at: Experiment) -> LlamaDloForCausalLM:
        return at.base.model()

    def deepened(at: Experiment) -> LlamaDloForCausalLM:
        return at.base.expanded(interleaved)

    def routed(target: float, seed: int) -> TrainingRun:
        kept = (target, seed) == (targets[0], first)  # to be moved to the other rates
        return TrainingRun("routed", original, f"-{target:.2f}-seed-{seed}", target=target, seed=seed, kept=kept)

    def distilled(target: float) -> TrainingRun:
        return TrainingRun(
            "distilled",
            lambda at: saved_model(at.results.model(ORIGINAL)),
            f"-{target:.2f}",
            mode="routers",
            target=target,
            distilled=True,
            after=ORIGINAL,
        )

    runs = [
        TrainingRun("original", original, kept=True),
        TrainingRun("deepened", deepened, kept=True),
        TrainingRun("dlo", deepened, target=form.target, kept=True),
        TrainingRun("dlo", deepened, "-cos-global", target=form.target, labelled=True),
        TrainingRun("dlo", deepened, "-slower-routers", target=form.target, router_rate=_SLOWER),
        routed(targets[0], first),
        TrainingRun("deepened-copies", lambda at: at.base.expanded(copied)),
        TrainingRun("llama-pro", deepened, mode="new-layers"),
        TrainingRun("dus", lambda at: at.base.expanded(dus_plan(layers))),
        TrainingRun("moe", lambda at: mixture(at.base)),
        distilled(targets[0]),
    ]
    unequal = [run for run in runs if run.kind in ("original", "llama-pro", "moe")]  # the original's comes first
    return [
        *runs,
        *(dataclasses.replace(run, suffix="-equal-flops", kept=False, equal_flops=True) for run in unequal),
        *(routed(targets[0], seed) for seed in others),
        *(distilled(target) for target in targets[1:]),
        *(routed(target, first) for target in targets[1:]),
        *(routed(target, seed) for target in targets[1:] for seed in others),
    ]


@torch.no_grad()
def routed_start(dense: LlamaDloForCausalLM, name: str, experiment: Experiment, target: float) -> LlamaDloForCausalLM:
    """The model with routers to train from: calibrated ones, and such as skip everything on identity layers.

    Args:
        dense: Deepened or not; shares its weights.
        name: Of the dense model.
        experiment: Has the text to calibrate on.
        target: Share of all MLPs that are to run. Where identity layers are enough to skip as much, only they are
            routed.
    """
    layers, identities = dense.config.num_hidden_layers, [*identity_layers(dense, "mlp")]
    share = target * layers / (layers - len(identities))
    if share < 1:
        routers = experiment.calibrated(name, dense, share)
    else:
        routers = {layer: np.zeros((1, dense.config.hidden_size), np.float32) for layer in identities}
    model = with_routers(dense, {layer: router.copy() for layer, router in routers.items()})
    model.tie_weights()  # else an optimiser would hold the head and the embeddings as two
    return model


def settings_of(
    run: TrainingRun, experiment: Experiment, model: LlamaDloForCausalLM, steps: int, batch: int
) -> TrainingSettings:
    """Of a run over so many steps of so many sequences.

    Routers start calibrated, so tokens are selected as at inference from the first step on, and nothing is annealed but
    gates: those of routers that learn alone (`router_distillation`), and of all where the form says so. What the rate
    lacks in the end, thresholds make up.
    """
    form, target = experiment.form, 1.0
    if run.target is not None:  # of all layers; training's is of those that are routed
        target = 1 - (1 - run.target) * model.config.num_hidden_layers / len(model.config.routed_layers)
    settings = TrainingSettings(
        mode=run.mode,
        target=target,
        anneal_steps=0,
        selection=form.selection,
        soft_steps=round(_SOFT_SHARE * steps),
        skip_weight=_LABELS_WEIGHT if run.labelled else form.skip_weight,
        distill_weight=form.distill_weight if run.target is not None else 0.0,
        max_steps=steps,
        batch=batch,
        sequence=form.sequence,
        long_chats="skip",
        learning_rate=form.learning_rate,
        router_learning_rate=form.router_learning_rate * run.router_rate,
        relative_router_rate=True,
        dtype=form.dtype,
        compile=form.compile and run.kind != "moe",
        eval_every=max(1, steps // form.curve_points),
        save_every=steps,
        seed=run.seed,
        device=experiment.device,
    )
    if not run.distilled:
        return settings
    return dataclasses.replace(  # as `dlo calibrate --objective distill` does
        settings,
        labels="self",
        selection="annealed",
        language_weight=0.0,
        distill_weight=1.0,
        skip_weight=0.0,
        router_learning_rate=DistillationSettings().learning_rate,
        layer_wise=False,
    )


def train(
    run: TrainingRun,
    experiment: Experiment,
    steps: int,
    batch: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains and measures.

    Args:
        run: What.
        experiment: Where.
        steps: How long.
        batch: Sequences of a step.
        should_stop: Asked after each step.

    Returns:
        None where it was stopped. A run that diverges has that for a result.
    """
    model = run.model(experiment)
    settings = settings_of(run, experiment, model, steps, batch)
    try:
        result, speeds, log = _trained(run, experiment, model, settings, should_stop)
    except TrainingDivergedError as err:
        return {"diverged": err.message}
    if result.stopped:
        return None
    assert result.held_out is not None, "only stopped runs have none"
    if run.kept or run.compared:
        experiment.base.save(model, experiment.results.model(run.name))
    measured = [entry for entry in log if "eval_loss" in entry]
    per_step = batch * experiment.form.sequence  # padding counts, since it is computed
    return {
        "kind": run.kind,
        "target": run.target,
        "seed": run.seed,
        "steps": steps,
        "tokens": steps * per_step,
        "tokens_per_second": float(np.median(speeds)),
        "rate_control": None if result.rate_control is None else dataclasses.asdict(result.rate_control),
        "curve": [{"tokens": entry["step"] * per_step, "loss": entry["eval_loss"]} for entry in measured],
        **experiment.measured(model),
        "settings": dataclasses.asdict(settings),
    }


def tokens_per_second(run: TrainingRun, experiment: Experiment, batch: int) -> float:
    """Trains a few steps: how fast this machine is. The first step, which also warms up, does not count."""
    model = run.model(experiment)
    settings = settings_of(run, experiment, model, experiment.form.probe_steps, batch)
    _, speeds, _ = _trained(run, experiment, model, settings, lambda: False)
    return float(np.median(speeds[1:] or speeds))


def _trained(
    run: TrainingRun,
    experiment: Experiment,
    model: LlamaDloForCausalLM,
    settings: TrainingSettings,
    should_stop: Callable[[], bool],
) -> tuple[TrainingResult, list[float], list[dict[str, Any]]]:
    """The result, each step's tokens per second, and the log."""
    # Without checkpoints: a run is resumed by running it again, and they take longer than the steps between them.
    folder = RunFolder(experiment.results.folder / "work" / run.name, resumable=False)
    shutil.rmtree(folder.path, ignore_errors=True)  # of a run that was broken off
    speeds: list[float] = []

    def note(report: StepReport) -> None:
        speeds.append(report.tokens_per_second)

    try:
        result = train_model(
            model,
            settings,
            experiment.data,
            folder=folder,
            description={"settings": dataclasses.asdict(settings), "model": run.name, "data": "text"},
            report=note,
            should_stop=should_stop,
        )
        log = [json.loads(line) for line in (folder.path / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
    return result, speeds, log


def flops_per_token(runs: Sequence[TrainingRun], experiment: Experiment) -> dict[str, float]:
    """FLOPs of training by kind. They depend on shapes and on what learns, and not on what routers decide.

    What `benchmarks.training_payload` counted ahead, for the same model and form, is not counted again.
    """
    counted = experiment.results.folder / FLOPS_NAME
    found: dict[str, float] = dict(read_json(counted)) if counted.is_file() else {}
    for run in runs:
        if run.kind in found:
            continue
        model = experiment.placed(experiment.base.model() if run.after is not None else run.dense(experiment))
        teacher = model if run.distilled else None
        if run.target is not None:
            zero = np.zeros((1, model.config.hidden_size), np.float32)
            model = with_routers(model, {layer: zero.copy() for layer in range(model.config.num_hidden_layers)})
            model.tie_weights()
            experiment.placed(model)
        choose_parameters(model, settings_of(run, experiment, model, 1, 1))
        found[run.kind] = training_flops(model, experiment.data.training, teacher)
    return found


def training_costs(
    runs: Sequence[TrainingRun], experiment: Experiment, seconds: float, speeds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What training costs on this machine, and what follows for each run.

    The fastest batch is taken: small steps leave a GPU waiting for its host. One that does not fit into memory, is
    hardly faster than the one before, or leaves the main table's runs less than `least_steps` steps ends the search.

    Args:
        runs: By falling importance.
        experiment: Says what is tried.
        seconds: What training the main table may take.
        speeds: Tokens per second of the deepened model, ``dense`` and ``routed``, where they are known: the form's
            first batch is taken then, and nothing is tried.

    Returns:
        ``flops`` of a token by kind of run; ``batch``; ``tokens_per_second`` of the deepened model, dense and routed;
        ``steps`` by name of the run; ``given`` where the speeds were.
    """
    form, every = experiment.form, _every_run(experiment)
    compared = [_run_of(every, kind) for kind in ("original", "deepened", _REFERENCE)]  # whatever the form's runs are
    costs: dict[str, Any] = {"flops": flops_per_token([*runs, *compared], experiment)}
    if speeds is not None:
        costs |= {"batch": form.batches[0], "tokens_per_second": dict(speeds), "given": True}
        return {**costs, "steps": planned_steps(runs, form, costs, seconds)}
    probes = {name: probe(experiment, name, "-probe") for name in ("dense", "routed")}
    for batch in form.batches:
        try:
            speeds = {name: tokens_per_second(run, experiment, batch) for name, run in probes.items()}
        except torch.cuda.OutOfMemoryError:
            if "batch" not in costs:
                raise
            break
        tried = {**costs, "batch": batch, "tokens_per_second": speeds}
        tried["steps"] = planned_steps(runs, form, tried, seconds)
        if "batch" in costs:
            faster = speeds["routed"] / costs["tokens_per_second"]["routed"]
            if faster < _WORTH_A_LARGER_BATCH or tried["steps"][runs[0].name] < form.least_steps:
                break
        costs = tried
    return costs


def probe(experiment: Experiment, name: str, suffix: str) -> TrainingRun:
    """A run to measure tokens per second with: of the deepened model, `dense` or `routed`, whatever the form's are."""
    kind = {"dense": "deepened", "routed": _REFERENCE}[name]
    return dataclasses.replace(_run_of(_every_run(experiment), kind), suffix=suffix, kept=False)


def seconds_per_token(run: TrainingRun, costs: Mapping[str, Any]) -> float:
    """Of training: in proportion to FLOPs, from the measured rate of a dense model or of a routed one.

    Args:
        run: Which.
        costs: As `training_costs` says them.
    """
    kind, probe = ("dense", "deepened") if run.target is None else ("routed", _REFERENCE)
    flops: Mapping[str, float] = costs["flops"]
    return flops[run.kind] / (flops[probe] * float(costs["tokens_per_second"][kind]))


def planned_steps(runs: Sequence[TrainingRun], form: Form, costs: Mapping[str, Any], seconds: float) -> dict[str, int]:
    """Steps by the name of the run: as many tokens as the main table's runs can have in the time there is.

    Where that would be too few for a run, the main table loses runs. All others get as many tokens, if time is left.

    Args:
        runs: By falling importance.
        form: Says how many tokens are wanted.
        costs: As `training_costs` says them.
        seconds: What training the main table may take.
    """
    flops = costs["flops"]
    share = {run.name: flops[_REFERENCE] / flops[run.kind] if run.equal_flops else 1.0 for run in runs}
    main = [*runs[: form.main_runs]]
    while True:
        tokens = min(form.tokens, int(seconds / sum(share[run.name] * seconds_per_token(run, costs) for run in main)))
        if tokens >= form.least_tokens or len(main) == 1:
            break
        main.pop()
    steps = max(1, tokens // (costs["batch"] * form.sequence))
    dropped = [] if len(main) == len(runs[: form.main_runs]) else runs[len(main) :]
    return {run.name: max(1, round(steps * share[run.name])) for run in runs if run not in dropped}


def _run_of(runs: Sequence[TrainingRun], kind: str) -> TrainingRun:
    return next(run for run in runs if run.kind == kind)
