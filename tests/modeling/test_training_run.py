import dataclasses
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dlo_export.checkpoints.errors import MachineError
from dlo_export.checkpoints.files.written_files import LIST_NAME
from dlo_export.modeling.training.compilation import compile_layers, compile_loss
from dlo_export.modeling.training.documents import TokenDocument
from dlo_export.modeling.training.errors import TrainingDivergedError, TrainingError
from dlo_export.modeling.training.fused_norm import use_fused_norms
from dlo_export.modeling.training.packing import PackedDocuments, PackedSets, stacked
from dlo_export.modeling.training.parameters import choose_parameters, merged_state, parameter_groups
from dlo_export.modeling.training.run_folder import RunFolder
from dlo_export.modeling.training.selection import training_routing
from dlo_export.modeling.training.skip_loss import skip_labels
from tests.modeling.training_runs import (
    SETTINGS,
    log_of,
    opened,
    packed_sets,
    run,
    run_rank,
    save_chats,
    save_routed,
    start_ranks,
    steps_of,
)
from tests.tiny_models import BYTE_VOCABULARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_routed(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def data(folder: Path, chats: Path) -> PackedSets:
    return packed_sets(folder, chats)


def changed(before: Path, model: Any) -> set[str]:
    """Names of the parameters that training changed."""
    old = dict(opened(before).named_parameters())
    return {name for name, value in merged_state(model) if not torch.equal(value, old[name])}


def test_training_learns_and_takes_the_labels_shares_as_capacities(
    folder: Path, data: PackedSets, tmp_path: Path
) -> None:
    model = opened(folder)
    settings = dataclasses.replace(SETTINGS, max_steps=60, learning_rate=5e-3, accumulate=2)
    result = run(model, data, tmp_path, settings)
    log = steps_of(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert (log[0]["target"], log[-1]["target"]) == (0.925, 0.7)
    assert log[0]["selected"] == 1
    assert log[-1]["selected"] == pytest.approx(0.7, abs=0.03)
    assert result.held_out is not None
    assert result.held_out.active_rate == pytest.approx(0.7, abs=0.05)
    assert result.held_out.loss < log[0]["loss"]


def test_fused_norms_compute_what_transformers_own_do(folder: Path, data: PackedSets) -> None:
    batch = stacked([data.training[0], data.training[1]])
    batch.pop("counted")
    found = []
    for fused in (False, True):
        model = opened(folder)
        if fused:
            use_fused_norms(model)
        names = [name for name, _ in model.named_parameters()]
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**batch, use_cache=False).loss
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found.append((names, loss.detach(), rounded.detach(), gradients))
    (names, loss, rounded, gradients), (same_names, same_loss, same_rounded, same_gradients) = found
    assert same_names == names
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_rounded, rounded, atol=2e-3, rtol=0)
    torch.testing.assert_close(same_gradients, gradients)


def test_routers_learn_by_their_size_when_the_rate_is_relative(folder: Path) -> None:
    model = opened(folder)
    settings = dataclasses.replace(SETTINGS, router_learning_rate=0.1, relative_router_rate=True)
    choose_parameters(model, settings)

    def rates() -> dict[int, float]:
        groups = parameter_groups(model, settings)
        of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        return {layer: of[id(model.model.router(layer).weight)] for layer in model.config.routed_layers}

    with torch.no_grad():
        for layer, size in ((0, 0.5), (2, 0.0)):
            model.model.router(layer).weight.fill_(size)
    assert rates() == pytest.approx({0: 0.05, 2: 0.05})  # an all-zero router has the size of the others
    with torch.no_grad():
        model.model.router(0).weight.zero_()
    assert rates() == pytest.approx({0: 0.1, 2: 0.1})


def test_whole_layers_are_trained_as_mlps_are(data: PackedSets, tmp_path: Path) -> None:
    folder = save_routed(tmp_path / "model", model_type="llama_dlo")
    model = opened(folder)
    result = run(model, data, tmp_path / "run", dataclasses.replace(SETTINGS, max_steps=30, learning_rate=5e-3))
    log = steps_of(tmp_path / "run")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert log[-1]["selected"] == pytest.approx(0.7, abs=0.05)
    assert result.held_out is not None
    assert result.held_out.active_rate == pytest.approx(0.7, abs=0.15)
    assert changed(folder, model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("labels", "mode"), [("cos-global", "full"), ("self", "lora")])
def test_a_resumed_run_equals_one_that_never_stopped(
    folder: Path, data: PackedSets, tmp_path: Path, labels: str, mode: str
) -> None:
    settings = dataclasses.replace(SETTINGS, labels=labels, mode=mode, accumulate=2, max_steps=7)
    whole = opened(folder)
    run(whole, data, tmp_path / "whole", settings)
    stopped, steps = opened(folder), []
    result = run(stopped, data, tmp_path / "parts", settings, report=steps.append, should_stop=lambda: len(steps) == 2)
    assert (result.stopped, result.step, result.steps, result.held_out) == (True, 3, 7, None)
    resumed = opened(folder)
    assert not run(resumed, data, tmp_path / "parts", settings, resume=True).stopped
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    expected = dict(merged_state(whole))
    assert all(torch.equal(value, expected[name]) for name, value in merged_state(resumed))


def test_a_finished_run_is_only_measured_when_resumed(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=2)
    finished = run(opened(folder), data, tmp_path, settings)
    log = log_of(tmp_path)
    again = opened(folder)
    assert run(again, data, tmp_path, settings, resume=True) == finished
    assert log_of(tmp_path) == log


def test_a_run_is_not_resumed_with_other_settings(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no training run to resume"):
        run(opened(folder), data, tmp_path / "run", resume=True)
    run(opened(folder), data, tmp_path / "run", dataclasses.replace(SETTINGS, max_steps=1))
    other = dataclasses.replace(SETTINGS, max_steps=1, learning_rate=1e-4, target=0.5)
    with pytest.raises(
        TrainingError, match=r"settings\.learning_rate is 0\.0001, was 0\.001\n  settings\.target is 0\.5"
    ):
        run(opened(folder), data, tmp_path / "run", other, resume=True)
    with pytest.raises(TrainingError, match="holds a training run already"):
        run(opened(folder), data, tmp_path / "run")


def test_a_run_is_not_resumed_from_a_checkpoint_when_files_of_it_are_gone_or_cut_short(
    folder: Path, data: PackedSets, tmp_path: Path
) -> None:
    """The Trainer alone would go on without the optimiser's states, or the random ones, and say nothing."""
    settings = dataclasses.replace(SETTINGS, max_steps=2, save_every=1)
    finished = run(opened(folder), data, tmp_path, settings)
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    damaged = r"checkpoint-2: the checkpoint is damaged: model\.safetensors, optimizer\.pt gone, or not as long"
    with pytest.raises(TrainingError, match=rf"{damaged} as written\n\nhint: remove that folder"):
        run(opened(folder), data, tmp_path, settings, resume=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run(opened(folder), data, tmp_path, settings, resume=True) == finished


def test_a_run_says_which_setting_is_behind_it_when_its_optimiser_has_other_groups(
    folder: Path, data: PackedSets, tmp_path: Path
) -> None:
    settings, steps = dataclasses.replace(SETTINGS, max_steps=3), []
    run(opened(folder), data, tmp_path, settings, report=steps.append, should_stop=lambda: len(steps) == 1)
    (file,) = tmp_path.glob("checkpoint-*/optimizer.pt")
    state = torch.load(file, weights_only=True)
    state["param_groups"].append(state["param_groups"][0] | {"params": []})
    torch.save(state, file)
    listed = json.loads((file.parent / LIST_NAME).read_text())
    listed["files"][file.name]["bytes"] = file.stat().st_size  # as if it had been written so
    (file.parent / LIST_NAME).write_text(json.dumps(listed))
    with pytest.raises(TrainingError, match="other groups of parameters than layer_wise True"):
        run(opened(folder), data, tmp_path, settings, resume=True)


@pytest.mark.parametrize("mode", ["full", "routers", "new-layers", "lora"])
def test_what_learns_is_what_the_mode_says(folder: Path, data: PackedSets, tmp_path: Path, mode: str) -> None:
    model = opened(folder)
    model.config.injected_layers = [{"position": 1, "source": 0, "init": "copy"}]
    run(model, data, tmp_path, dataclasses.replace(SETTINGS, mode=mode, max_steps=2, rate_weight=1.0))
    routers = {"model.routers.0.weight", "model.routers.2.weight"}
    new = {name for name, _ in merged_state(model) if name.startswith("model.layers.1.")}
    projections = {name for name, _ in merged_state(model) if "_proj.weight" in name}
    everything = {name for name, _ in merged_state(model)}
    expected = {"full": everything, "routers": routers, "new-layers": routers | new, "lora": routers | projections}
    assert changed(folder, model) == expected[mode]


def test_new_layers_alone_cannot_learn_when_there_are_none(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="names no injected_layers"):
        run(opened(folder), data, tmp_path / "run", dataclasses.replace(SETTINGS, mode="new-layers"))
    assert not (tmp_path / "run").exists()


def test_lora_merged_equals_the_model_it_was_trained_in(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    model = opened(folder)
    run(model, data, tmp_path, dataclasses.replace(SETTINGS, mode="lora", learning_rate=1e-2))
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        merged = opened(folder)
        merged.load_state_dict(dict(merged_state(model)))
        merged.config.router_thresholds = model.config.router_thresholds
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["full", "routers"])
def test_distillation_starts_at_the_dense_models_own_words_and_brings_the_model_back_to_them(
    folder: Path, data: PackedSets, tmp_path: Path, mode: str
) -> None:
    settings = dataclasses.replace(
        SETTINGS, mode=mode, language_weight=0.0, distill_weight=1.0, skip_weight=0.0, rate_weight=0.0, max_steps=30
    )
    # With everything selected the first step is the dense model, but for a scale of nearly 1.
    run(opened(folder), data, tmp_path / "dense", dataclasses.replace(settings, target=1.0, max_steps=1))
    assert steps_of(tmp_path / "dense")[0]["distill_loss"] < 1e-3
    model = opened(folder)
    skipping = dataclasses.replace(settings, anneal_steps=0, selection="threshold", router_learning_rate=2e-2)
    run(model, data, tmp_path / "run", skipping)
    log = steps_of(tmp_path / "run")
    assert log[0]["distill_loss"] > 0.1
    assert log[-1]["distill_loss"] < 0.9 * log[0]["distill_loss"]


@pytest.mark.parametrize(("mode", "distill"), [("full", 0.0), ("routers", 1.0)])
def test_each_mlp_runs_once_per_micro_batch_for_output_and_labels(
    folder: Path, data: PackedSets, tmp_path: Path, mode: str, distill: float
) -> None:
    model, calls = opened(folder), dict.fromkeys(range(3), 0)
    for number, layer in enumerate(model.model.layers):

        def count(module: torch.nn.Module, _arguments: Any, _output: Any, number: int = number) -> None:
            calls[number] += module.training

        layer.mlp.register_forward_hook(count)
    settings = dataclasses.replace(SETTINGS, max_steps=3, accumulate=2, mode=mode, distill_weight=distill)
    run(model, data, tmp_path, settings)
    assert calls == dict.fromkeys(range(3), 6)


def test_layers_learn_faster_the_more_of_their_tokens_are_kept(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    rates: list[list[tuple[int | None, float]]] = []
    settings = dataclasses.replace(SETTINGS, max_steps=2, save_every=1, router_learning_rate=1e-2, anneal_steps=0)
    noting = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append([(group["layer"], group["lr"]) for group in optimizer.param_groups])
    )
    try:
        run(opened(folder), data, tmp_path, settings)
    finally:
        noting.remove()
    stored = json.loads((tmp_path / "checkpoint-1" / "capacities.json").read_text())
    capacities = {int(layer): share for layer, share in stored.items()}
    mean = sum(capacities.values()) / 2
    assert mean == pytest.approx(settings.target, abs=0.02)
    assert capacities[0] != pytest.approx(capacities[2], abs=0.05)
    half = 0.5 * settings.learning_rate  # the cosine in the second of two steps
    layers = {layer: half * (share + 1 - mean) for layer, share in capacities.items()} | {1: half}
    assert dict(rates[1]) | {None: 0} == pytest.approx(layers | {None: 0})
    assert sorted(rate for layer, rate in rates[1] if layer is None) == pytest.approx([half, 10 * half])


def test_capacities_are_shares_of_all_tokens_when_micro_batches_have_unequal_padding(
    folder: Path, tmp_path: Path
) -> None:
    """DLO: a layer's share of ones. The mean of micro-batches' shares would count few tokens as much as many."""
    ids = np.random.default_rng(0).integers(3, BYTE_VOCABULARY, 64).tolist()
    texts = [
        TokenDocument("text", np.array(tokens), np.ones(len(tokens), np.bool_)) for tokens in (ids, ids[::-1][:10])
    ]
    data = PackedSets(PackedDocuments(texts, 64), PackedDocuments(texts, 64))
    settings = dataclasses.replace(SETTINGS, max_steps=1, batch=1, accumulate=2, anneal_steps=0, save_every=1)
    model, ones, active, shares = opened(folder), np.zeros(2), 0, []
    with torch.no_grad():
        for sequence in data.training:
            batch = stacked([sequence])
            counted = batch.pop("counted")
            start = dict.fromkeys(model.config.routed_layers, settings.rate(0))
            outputs = model(**batch, **training_routing(settings, 0, start, {}, counted), use_cache=False)
            labels = skip_labels("cos-global", outputs.training_routing, counted, settings.rate(0))
            found = np.array([int(chosen.sum()) for chosen in labels.values()])
            ones, shares = ones + found, [*shares, found / int(counted.sum())]
            active += sum(int((scores > 0.5)[counted].sum()) for scores in outputs.router_scores.values())
    assert not np.allclose(ones / 74, np.mean(shares, 0), atol=0.02)
    run(opened(folder), data, tmp_path, settings)
    stored = json.loads((tmp_path / "checkpoint-1" / "capacities.json").read_text())
    assert list(stored.values()) == (ones / 74).tolist()
    (step,) = steps_of(tmp_path)
    assert step["active"] == active / (2 * 74)


@pytest.mark.parametrize("selection", ["top-k", "threshold"])
def test_evaluation_routes_as_inference_and_beside_it_as_training(
    folder: Path, data: PackedSets, tmp_path: Path, selection: str
) -> None:
    model = opened(folder)
    held_out = run(model, data, tmp_path, dataclasses.replace(SETTINGS, selection=selection)).held_out
    assert held_out is not None
    batch = stacked([data.held_out[index] for index in range(len(data.held_out))])
    counted, labels = batch.pop("counted"), batch.pop("labels")
    with torch.no_grad():
        outputs = model(**batch, use_cache=False)
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert held_out.loss == pytest.approx(float(loss), rel=1e-5)
    for layer, scores in outputs.router_scores.items():
        assert held_out.active[layer] == pytest.approx(
            float((scores > model.config.threshold(layer))[counted].double().mean()), abs=1e-9
        )
    assert (held_out.training_loss == held_out.loss) == (selection == "threshold")


def test_bf16_trains_in_fp32_weights_with_gradient_checkpointing(
    folder: Path, data: PackedSets, tmp_path: Path
) -> None:
    model = opened(folder)
    settings = dataclasses.replace(SETTINGS, dtype="bf16", gradient_checkpointing=True)
    run(model, data, tmp_path / "bf16", settings)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    run(opened(folder), data, tmp_path / "fp32")
    losses = [[entry["loss"] for entry in steps_of(tmp_path / name)] for name in ("bf16", "fp32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layers_are_compiled_once_for_all_steps(folder: Path, data: PackedSets, tmp_path: Path, dtype: str) -> None:
    settings = dataclasses.replace(SETTINGS, dtype=dtype, max_steps=4)
    run(opened(folder), data, tmp_path / "eager", settings)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:  # what comes after tracing is not ours to test
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = opened(folder)
    compile_layers(model, backend=backend, fullgraph=True)
    compile_loss(model, backend=backend, fullgraph=True)
    run(model, data, tmp_path / "compiled", settings)
    assert len(graphs) == 3  # of a routed layer, of another, whatever is selected in which step, and of the loss
    assert steps_of(tmp_path / "compiled") == steps_of(tmp_path / "eager")


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("weight", "the loss of step 4 .*: layer 1 is the first whose output is not"),
        ("gradient", r"the gradient of step 4 .*: model\.layers\.1\.mlp\.up_proj\.weight is the first"),
    ],
)
def test_a_diverging_run_names_step_and_layer_and_keeps_its_checkpoint(
    folder: Path, data: PackedSets, tmp_path: Path, spoiled: str, message: str
) -> None:
    model = opened(folder)
    weight = model.model.layers[1].mlp.up_proj.weight

    def spoil(report: Any) -> None:
        if report.step == 3 and spoiled == "gradient":
            weight.register_hook(lambda gradient: gradient * torch.nan)
        elif report.step == 3:
            with torch.no_grad():
                weight[0, 0] = torch.nan

    settings = dataclasses.replace(SETTINGS, save_every=2)
    with pytest.raises(TrainingDivergedError, match=rf"{message}.*\n\nhint: .*checkpoint-2"):
        run(model, data, tmp_path, settings, report=spoil)
    resumed = opened(folder)
    assert run(resumed, data, tmp_path, settings, resume=True).step == 6


@pytest.mark.parametrize(
    ("more", "message"), [(-50_000, "File too large"), (50_000, "a file could not be written whole")]
)
def test_a_full_disk_leaves_the_last_checkpoint_intact(
    folder: Path, data: PackedSets, tmp_path: Path, more: int, message: str
) -> None:
    """Where the weights do not fit, and where they do and the optimiser's larger file does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(report: Any) -> None:
        if report.step == 3:  # files may grow to this size and no further, as on a disk with so much left
            weights = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (weights + more, limits[1]))

    settings = dataclasses.replace(SETTINGS, save_every=2)
    try:
        with pytest.raises(
            MachineError, match=rf"checkpoint-4: .*cannot be written: .*{message}.*\n\nhint: .*from checkpoint-2"
        ):
            run(opened(folder), data, tmp_path, settings, report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert run(opened(folder), data, tmp_path, settings, resume=True).step == 6


def test_a_run_is_followed_in_tensorboard_when_it_is_installed(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(opened(folder), data, tmp_path, dataclasses.replace(SETTINGS, eval_every=3))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag, key in (("train/loss", "loss"), ("train/active", "active"), ("eval/active", "eval_active")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [
            (entry["step"], pytest.approx(entry[key], rel=1e-6)) for entry in log_of(tmp_path) if key in entry
        ]
    assert len(events.Scalars("train/tokens_per_second")) == 6


def test_only_the_newest_checkpoints_stay(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    run(opened(folder), data, tmp_path, dataclasses.replace(SETTINGS, save_every=1))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert RunFolder(tmp_path).last_checkpoint() == tmp_path / "checkpoint-6"


def test_two_processes_equal_one_when_the_batch_is_the_same(
    folder: Path, chats: Path, data: PackedSets, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=2)
    one = opened(folder)
    run(one, data, tmp_path / "one", settings)
    ranks = start_ranks(run_rank, folder, chats, tmp_path / "two")
    for rank in ranks:
        rank.join(timeout=240)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    alone, together = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert len(alone) == len(together) == 6
    for first, second in zip(alone, together, strict=True):
        assert second == pytest.approx(first, rel=1e-4)
    capacities = [(tmp_path / name / "checkpoint-6" / "capacities.json").read_text() for name in ("one", "two")]
    assert capacities[0] == capacities[1]


def test_weights_without_a_gradient_stay_what_they_are(folder: Path, data: PackedSets, tmp_path: Path) -> None:
    model = opened(folder)
    before = model.model.embed_tokens.weight.detach().clone()
    run(model, data, tmp_path, dataclasses.replace(SETTINGS, max_steps=2, learning_rate=0.1))
    fed = torch.zeros(len(before), dtype=torch.bool)
    fed[torch.cat([data.training[index]["input_ids"] for index in range(len(data.training))]).unique()] = True
    assert 0 < fed.sum() < len(before)
    assert torch.equal(model.model.embed_tokens.weight[~fed], before[~fed])
    assert not torch.equal(model.model.embed_tokens.weight[fed], before[fed])
