"""All experiments, one piece after the other."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.measure import machine, versions
from benchmarks.common.smollm2 import smollm2_folder
from benchmarks.papers.budget import Budget, Piece, run_pieces
from benchmarks.papers.expansion_loss import BASE, expansion_pieces, pass_seconds
from benchmarks.papers.experiment import Experiment
from benchmarks.papers.forms import Form
from benchmarks.papers.report import heading, write_plots, write_tables
from benchmarks.papers.results import Results
from benchmarks.papers.shipped import shipped_pieces
from benchmarks.papers.skipping_cost import (
    as_asked_pieces,
    as_many_pieces,
    calibrated_baselines,
    calibrated_pieces,
    removal_pieces,
    retargeted_pieces,
)
from benchmarks.papers.subjects import BaseModel
from benchmarks.papers.tables import COSTS, broken_promises
from benchmarks.papers.tasks import task_files, task_pieces
from benchmarks.papers.text import prepare_text, use_other_chats
from benchmarks.papers.token_kinds import kind_pieces
from benchmarks.papers.toy import TOY_TOKENS, toy_model
from benchmarks.papers.training import (
    TrainingRun,
    probe,
    seconds_per_token,
    tokens_per_second,
    train,
    training_costs,
    training_runs,
)
from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.file_digest import file_sha256

_FOR_THE_REPORT_S = 15.0  # tables and plots


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be reproduced.

    Attributes:
        output: Folder of the results.
        form: Its name and sizes.
        started: When the budget began, on the monotonic clock.
        budget_s: Seconds for everything.
        device: "cpu" or "cuda".
        model: What to start from; None for SmolLM2-135M.
        tasks: Folder of log-likelihood tasks to measure artefacts on.
        data: Chats to train on in place of the extracted ones.
        publish: Folder for copies of the tables and plots.
        only: ``expansion``: table (a), which needs no training; ``training``: (b), (c) and (e), and (d)'s tasks on
            checkpoints; ``shipped``: artefacts
            of the models that are there, which needs no GPU; ``exported``: the same without timing them, which is to be
            alone on its cores; ``trained``: training runs, and nothing of what they are
            compared with; ``runs``: some training runs of another process' plan. None for everything.
        runs: Of ``runs``: which.
        elsewhere: Runs that other processes train, into the same folder.
        workers: Processes that train at once: a small model's steps keep no GPU busy.
        speeds: Tokens per second of the deepened model in all processes together, ``dense`` and ``routed``, where they
            are known (`benchmarks.training_rate` measures those of one alone); None to measure them first.
    """

    output: Path
    form: tuple[str, Form]
    started: float
    budget_s: float
    device: str
    model: Path | None
    tasks: Path | None
    data: Path | None
    publish: Path | None
    only: str | None = None
    runs: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    workers: int = 1
    speeds: Mapping[str, float] | None = None


def reproduce(request: Request) -> dict[str, Any]:
    """Does what is not there yet and fits, and writes tables and plots.

    Returns:
        What the command prints as its JSON line.

    Raises:
        InputError: The output holds other results, or the model or the data are not usable.
        MachineError: There is no such device.
    """
    import torch  # noqa: PLC0415 - behind the extraction's processes

    name, form = request.form
    end = request.started + request.budget_s
    budget = Budget(end - min(_FOR_THE_REPORT_S, 0.1 * request.budget_s))
    if request.device == "cuda" and not torch.cuda.is_available():
        raise MachineError("reproduce_papers: PyTorch finds no CUDA device", hint="--device cpu --form hour")
    results = Results(request.output)
    prepare(results, request)
    path = toy_model(results, form) if form.toy and request.model is None else request.model or smollm2_folder()
    with BaseModel(path) as base:
        results.begin(
            {
                "form": {"name": name, **dataclasses.asdict(form)},
                "device": request.device,
                "model": base.sha256(),
                "text": {file.name: file_sha256(file) for file in sorted(results.text.iterdir())},
            }
        )
        experiment = Experiment(base, form, results, request.device, request.tasks)
        ready = experiment.prepare(warm_up=request.only not in ("exported", "shipped"))  # which run on the CPU
        print(f"text: {ready}, {budget.left:.0f} s left", file=sys.stderr, flush=True)
        left_out: dict[str, str] = {}
        if request.only not in ("exported", "shipped", "runs"):
            expanded = expansion_pieces(experiment)
            whole_table = request.only in (None, "expansion")
            left_out |= run_pieces(expanded if whole_table else expanded[:1], results, budget)
        if request.only in (None, "training", "trained"):
            left_out |= _run_others(experiment, budget, request)
        if request.only == "runs":
            left_out |= _run_some(experiment, budget, request)
            results.leave_out(left_out)
            return {"form": name, "left_out": left_out, "passed": True}
        if request.only in ("exported", "shipped"):
            pieces = shipped_pieces(experiment)
            left_out |= run_pieces(pieces[: -1 if request.only == "exported" else None], results, budget)
    results.leave_out(left_out)
    toy = form.toy and request.model is None
    shown = heading(
        results, request.form, model=None if toy else path.name, device=request.device, budget_s=request.budget_s
    )
    print(write_tables(results, shown))
    write_plots(results, request.publish)
    broken = broken_promises(results)
    return {
        "form": name,
        "device": request.device,
        "budget_s": request.budget_s,
        "took_s": round(time.monotonic() - request.started, 1),
        "left_out": left_out,
        "function_not_kept": broken,
        "passed": not broken,
        "versions": versions("torch", "transformers", "numpy"),
        **machine(),
    }


def prepare(results: Results, request: Request) -> None:
    """Makes the text, unless it is there."""
    _, form = request.form
    if results.text.exists():
        return
    prepare_text(
        results.text,
        training_tokens=max(form.tokens, form.calibration_tokens, TOY_TOKENS if form.toy else 0),
        held_out_tokens=form.held_out_tokens,
        packages=form.packages,
    )
    if request.data is not None:
        use_other_chats(results.text, request.data)


def _run_some(experiment: Experiment, budget: Budget, request: Request) -> dict[str, str]:
    """Training runs of a plan that another process makes."""
    runs, results, names = training_runs(experiment), experiment.results, request.runs
    if request.speeds is not None:  # which are those of a process alone
        while COSTS not in results and not budget.is_over():
            time.sleep(0.1)
    load = probe(experiment, "dense", f"-load-{os.getpid()}")
    while BASE not in results and not budget.is_over():
        time.sleep(0.1)  # a measurement that is not to be disturbed
    while COSTS not in results and not budget.is_over():
        # The other one measures how fast it trains beside this one: so this one has to train.
        tokens_per_second(load, experiment, experiment.form.batches[0])
    if COSTS not in results:
        return dict.fromkeys(names, "no plan was made")
    steps: dict[str, int] = results[COSTS]["steps"]
    chosen = [run for run in runs if run.name in names and run.name in steps]
    return run_pieces(_training_pieces(chosen, experiment, budget, request), results, budget)


def _run_others(experiment: Experiment, budget: Budget, request: Request) -> dict[str, str]:
    """Everything that needs training; artefacts, which take a CPU minutes, where everything is wanted."""
    exports = request.only is None
    runs, results = training_runs(experiment), experiment.results
    costs = Piece(
        COSTS,
        lambda: 10 * pass_seconds(experiment),
        lambda: training_costs(runs, experiment, _training_seconds(experiment.form, budget, request), request.speeds),
    )
    left_out = run_pieces([costs], results, budget)
    if COSTS not in results:
        return left_out
    steps: dict[str, int] = results[COSTS]["steps"]
    planned = [run for run in runs if run.name in steps]
    left_out |= {
        run.name: f"with it, no run of the main table would have {experiment.form.least_tokens:,} tokens"
        for run in runs
        if run.name not in steps
    }
    if request.only == "trained":
        return left_out | run_pieces(_training_pieces(planned, experiment, budget, request), results, budget)
    own = [run for run in planned if run.name not in request.elsewhere]
    theirs = [run for run in planned if run.name in request.elsewhere]
    # Other pieces need the models that are kept; what skips in the main table comes before these pieces as well.
    main = [run.name for run in runs[: experiment.form.main_runs] if run.compared]
    count = 1 + max((number for number, run in enumerate(own) if run.kept or run.name in main), default=-1)
    first, others = own[:count], own[count:]
    shipped = shipped_pieces(experiment) if exports else []
    if importlib.util.find_spec("onnxruntime") is None:
        left_out |= {piece.name: "ONNX Runtime is not installed" for piece in shipped}
        shipped = []
    left_out |= run_pieces(_compared_training(first, experiment, budget, request), results, budget)
    meanwhile = [
        *calibrated_pieces(experiment),
        *_as_trained(experiment, first),
        *_retargeted(experiment, first),
        *shipped,
        *kind_pieces(experiment, first),
        *_compared_training(others, experiment, budget, request),
        *_as_trained(experiment, others),
        *_retargeted(experiment, others),
        *task_pieces(experiment, first, of_artefacts=exports),
    ]
    left_out |= _measure_others(theirs, experiment, budget, meanwhile, of_artefacts=exports)
    last = [*calibrated_baselines(experiment), *removal_pieces(experiment, budget)]
    return left_out | run_pieces(last, results, budget)


def _measure_others(
    runs: Sequence[TrainingRun],
    experiment: Experiment,
    budget: Budget,
    meanwhile: Sequence[Piece],
    *,
    of_artefacts: bool,
) -> dict[str, str]:
    """What other processes train, as it comes, what skips first; one piece of others while nothing has come.

    Args:
        runs: That other processes train.
        experiment: Where.
        budget: Time there is.
        meanwhile: The other pieces, by falling importance.
        of_artefacts: Whether tasks are measured on artefacts.
    """
    results, waiting, queue = experiment.results, [*runs], [*meanwhile]
    left_out: dict[str, str] = {}
    while waiting and not budget.is_over():
        come = [run for run in waiting if run.name in results]
        waiting = [run for run in waiting if run not in come]
        first = [run for run in come if run.seed == experiment.form.seeds[0]]
        others = [run for run in come if run not in first]  # which only repeat it
        more = [*_as_trained(experiment, first), *_retargeted(experiment, first), *kind_pieces(experiment, first)]
        more += task_pieces(experiment, first, of_artefacts=of_artefacts)
        queue = [*more, *queue, *_as_trained(experiment, others)]
        pieces = as_asked_pieces(experiment, come)
        if not pieces and queue:
            pieces.append(queue.pop(0))
        left_out |= run_pieces(pieces, results, budget)
        time.sleep(0 if pieces else 0.2)
    return left_out | run_pieces(queue, results, budget)


def _training_seconds(form: Form, budget: Budget, request: Request) -> float:
    """What training the main table may take, at the speeds of the plan."""
    processes = request.workers if request.speeds is None else 1
    return processes * form.training_share * budget.left


def _compared_training(
    runs: Sequence[TrainingRun], experiment: Experiment, budget: Budget, request: Request
) -> list[Piece]:
    """Training runs, each with what it is compared with right behind it: a run without that shows nothing."""
    return [
        piece
        for run in runs
        for piece in (
            _training_piece(run, experiment, budget, request),
            *as_asked_pieces(experiment, [run]),
        )
    ]


def _as_trained(experiment: Experiment, runs: Sequence[TrainingRun]) -> list[Piece]:
    """What skips as much as runs do with the thresholds that training left them."""
    return as_many_pieces(experiment, [run.name for run in runs if run.compared])


def _retargeted(experiment: Experiment, runs: Sequence[TrainingRun]) -> list[Piece]:
    """Routed runs that are kept at the form's other rates, and what skips as much."""
    moved = retargeted_pieces(experiment, runs)
    return [*moved, *as_many_pieces(experiment, [piece.name for piece in moved])]


def _training_pieces(
    runs: Sequence[TrainingRun], experiment: Experiment, budget: Budget, request: Request
) -> list[Piece]:
    return [_training_piece(run, experiment, budget, request) for run in runs]


def _training_piece(run: TrainingRun, experiment: Experiment, budget: Budget, request: Request) -> Piece:
    costs = experiment.results[COSTS]  # decided once, so that a resumed run keeps to it
    steps, batch = costs["steps"][run.name], costs["batch"]
    alone: float = steps * batch * experiment.form.sequence * seconds_per_token(run, costs)
    # Speeds that were measured by a process alone are those of all of them together.
    training = alone if request.speeds is None else alone * request.workers
    slower: float = costs["flops"][run.kind] / costs["flops"]["original"]

    def seconds() -> float:
        return 1.15 * training + 3 * pass_seconds(experiment) * slower

    needs = () if run.after is None else (run.after,)
    return Piece(run.name, seconds, functools.partial(train, run, experiment, steps, batch, budget.is_over), needs)


def check(request: Request) -> None:
    """Refuses what cannot be before any work.

    Raises:
        InputError: A path is missing or a number out of range.
    """
    given = [path for path in (request.model, request.data, request.tasks) if path is not None]
    problems = [f"{path}: no such file or folder" for path in given if not path.exists()]
    _, form = request.form
    if form.held_out_tokens < form.sequence:
        problems.append(f"--held-out-tokens {form.held_out_tokens}: a window has {form.sequence}")
    if request.budget_s <= 0:
        problems.append(f"--budget-s {request.budget_s}: expected more than 0")
    if request.output.exists() and not request.output.is_dir():
        problems.append(f"{request.output}: is no folder")
    if problems:
        raise InputError(f"reproduce_papers: {'; '.join(problems)}", hint="see --help")
    if request.tasks is not None:
        task_files(request.tasks)
