import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import dlo_export.modeling.llama_dlo  # noqa: F401 (registers the routed model)
from dlo_export.checkpoints import lazy_tensors
from dlo_export.checkpoints.adapter.adapter import InjectedLayer, load_adapter, save_adapter
from dlo_export.checkpoints.checkpoint_folder import save_checkpoint
from dlo_export.checkpoints.depth.expansion import (
    ExpansionError,
    expanded_config,
    expanded_tensors,
    expansion_adapter,
    placements,
)
from dlo_export.checkpoints.depth.layer_init import LAYER_INITS, LayerInitError
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.modeling.from_tensors import ModelTensorsError, llama_dlo_from_tensors
from tests.initial_arrays import init_tensor
from tests.tiny_models import save_tiny_llama


def open_tiny(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    save_tiny_llama(folder, **settings)
    arrays = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return config, {name: ArrayTensor(array) for name, array in arrays.items()}


def save_deepened(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], plan: Any, folder: Path, **options: Any
) -> None:
    """Expands and saves, with config.json as the only companion."""
    zero_routers = options.pop("zero_routers", False)

    def save_config(folder: Path, changes: Mapping[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    save_checkpoint(
        expanded_tensors(tensors, plan, zero_routers=zero_routers),
        folder,
        save_companions=save_config,
        config_changes=expanded_config(config, plan, zero_routers=zero_routers),
        **options,
    )


def positions(plan: Any) -> list[int]:
    return [layer.position for layer in plan.injected_layers]


def test_interleave_places_new_layers_at_4_to_39_when_32_become_40() -> None:
    plan = placements("interleave", 32, target_layers=40)
    assert positions(plan) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert [layer.source for layer in plan.injected_layers] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert {layer.init for layer in plan.injected_layers} == {"zero_out"}
    assert plan.num_layers == 40


def test_interleave_adds_exactly_the_asked_number_when_groups_do_not_divide() -> None:
    plan = placements("interleave", 30, target_layers=37, init="slerp")
    assert plan.num_layers == 37
    assert [layer.source for layer in plan.injected_layers] == [3, 7, 11, 15, 19, 23, 27]


def test_tli_adds_floor_l_over_k_layers_when_every_k() -> None:
    plan = placements("tli", 30, every=5)
    assert positions(plan) == [5, 11, 17, 23, 29, 35]
    assert placements("tli", 32, every=5).num_layers == 38
    assert [layer.source for layer in placements("tli", 12, every=4, offset=2).injected_layers] == [5, 9]
    assert {layer.init for layer in placements("tli-copy", 30, every=5).injected_layers} == {"copy"}
    assert {layer.init for layer in placements("tli-zero-out", 30, every=5).injected_layers} == {"zero_out"}


def test_tli_mixes_the_neighbours_when_source_is_mean_or_slerp() -> None:
    mean = placements("tli", 4, every=2, source="mean", init="copy").injected_layers
    assert mean == (InjectedLayer(2, 2, "linear"), InjectedLayer(5, 3, "copy"))
    slerp = placements("tli", 4, every=2, source="slerp", init="zero_out").injected_layers
    assert slerp == (InjectedLayer(2, 2, "slerp_zero_out"), InjectedLayer(5, 3, "zero_out"))
    following = placements("tli", 4, every=2, source="next", init="copy").injected_layers
    assert following == (InjectedLayer(2, 2, "copy"), InjectedLayer(5, 3, "copy"))


def test_llama_pro_adds_copies_after_each_group_when_several_per_group() -> None:
    plan = placements("llama-pro", 6, groups=2, per_group=2)
    assert plan.injected_layers == tuple(
        InjectedLayer(position, source, "zero_out") for position, source in [(3, 2), (4, 2), (8, 5), (9, 5)]
    )


def test_methods_take_the_least_and_the_most_that_they_can() -> None:
    assert placements("llama-pro", 3, groups=1).original_positions == (0, 1, 2)
    assert placements("llama-pro", 2, groups=2).original_positions == (0, 2)
    assert [layer.source for layer in placements("dus", 3, overlap=0).injected_layers] == [0, 1, 2]
    assert placements("tli", 4, every=4).num_layers == 5


def test_dus_repeats_the_middle_when_32_with_overlap_8() -> None:
    plan = placements("dus", 32, overlap=8)
    assert plan.num_layers == 48
    layers = [None] * 48
    for position, base in zip(plan.original_positions, range(32), strict=True):
        layers[position] = base
    for layer in plan.injected_layers:
        layers[layer.position] = layer.source
    assert layers == [*range(24), *range(8, 32)]


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("stack-side", {}, "found method 'stack-side', expected one of tli, interleave, llama-pro, dus, tli-copy"),
        ("tli", {"every": 0}, "every 0 with offset 0 injects nothing into 30 layers"),
        ("tli", {"every": 5, "offset": -1}, "every 5 with offset -1 injects nothing into 30 layers"),
        ("tli", {"every": 31}, "every 31 with offset 0 injects nothing into 30 layers"),
        ("tli", {"every": 5, "source": "both"}, "found source 'both', expected one of prev, next, mean, slerp"),
        ("tli", {"every": 5, "source": "mean", "init": "random"}, "source mean goes with init copy or zero_out"),
        ("tli", {}, "expansion tli: needs every\n\nhint: its parameters are every, offset, source, init"),
        ("dus", {"every": 2}, "expansion dus: needs overlap, and has no every\n\nhint: its parameters are overlap"),
        ("interleave", {"target_layers": 61}, "target_layers 61 of 30 layers, expected from 31 to 60"),
        ("interleave", {"target_layers": 30}, "target_layers 30 of 30 layers, expected from 31 to 60"),
        ("llama-pro", {"groups": 31}, "31 groups of 1 new layers among 30 originals, expected 1 to 30 groups"),
        ("llama-pro", {"groups": 0}, "0 groups of 1 new layers among 30 originals, expected 1 to 30 groups"),
        ("llama-pro", {"groups": 1, "per_group": 10**6}, "make 1000030 layers, expected at most"),
        ("dus", {"overlap": -1}, "overlap -1 of 30 layers, expected from 0 to 14"),
        ("dus", {"overlap": 15}, "overlap 15 of 30 layers, expected from 0 to 14"),
    ],
)
def test_placements_raise_when_numbers_do_not_work_out(method: str, parameters: dict, message: str) -> None:
    with pytest.raises(ExpansionError, match=message.replace("(", r"\(")):
        placements(method, 30, **parameters)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tli", {"every": 1}),
        ("interleave", {"target_layers": 12_000}),
        ("llama-pro", {"groups": 6_000}),
        ("dus", {"overlap": 0}),
    ],
)
def test_placements_raise_when_the_model_would_be_deeper_than_one_that_is_read(method: str, parameters: dict) -> None:
    with pytest.raises(ExpansionError, match="6000 originals make 12000 layers, expected at most 10000"):
        placements(method, 6_000, **parameters)


def test_placements_raise_when_init_is_unknown() -> None:
    with pytest.raises(LayerInitError, match="found 'average'"):
        placements("interleave", 30, target_layers=36, init="average")


@torch.no_grad()
@pytest.mark.parametrize("source", ["prev", "next", "mean", "slerp"])
def test_expansion_keeps_the_function_when_tli_zero_out(tmp_path: Path, source: str) -> None:
    config, tensors = open_tiny(tmp_path / "base", layers=5, attention_bias=True, mlp_bias=True)
    plan = placements("tli", 5, every=2, source=source, init="zero_out")
    save_deepened(config, tensors, plan, tmp_path / "deep")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deep = AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    assert deep.config.model_type == "llama"
    assert deep.config.num_hidden_layers == 7
    assert deep.config.injected_layers == [
        {"position": layer.position, "source": layer.source, "init": layer.init} for layer in plan.injected_layers
    ]
    ids = torch.arange(24).reshape(2, 12)
    np.testing.assert_allclose(deep(ids).logits, base(ids).logits, atol=1e-6)


@pytest.mark.parametrize("init", ["copy", "linear", "slerp", "random", "zero_out"])
def test_expanded_tensors_equal_the_init_of_their_source(tmp_path: Path, init: str) -> None:
    _, tensors = open_tiny(tmp_path, layers=4)
    plan = placements("interleave", 4, target_layers=6, init=init)
    deepened = expanded_tensors(tensors, plan, seed=3, initializer_range=0.1)
    for role in ("self_attn.o_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
        for new, source in ((2, 1), (5, 3)):
            arrays = [tensors[f"model.layers.{layer}.{role}"].numpy() for layer in (source, source - 1)]
            expected = init_tensor(init, role, *arrays, seed=(3, new), initializer_range=0.1)
            np.testing.assert_array_equal(deepened[f"model.layers.{new}.{role}"].numpy(), expected)
        np.testing.assert_array_equal(
            deepened[f"model.layers.4.{role}"].numpy(), tensors[f"model.layers.3.{role}"].numpy()
        )


def test_expansion_renumbers_every_list_when_a_routed_model_has_more_than_ten_layers(tmp_path: Path) -> None:
    routed = [layer % 3 == 0 for layer in range(13)]
    config, tensors = open_tiny(tmp_path, layers=13, routed=routed)
    config["dlo_capacity"] = [0.01 * layer for layer in range(13)]
    plan = placements("tli", 13, every=6)
    assert positions(plan) == [6, 13]
    changes = expanded_config(config, plan)
    moved = {layer: layer + (layer >= 6) + (layer >= 12) for layer in range(13)}
    assert [i for i, on in enumerate(changes["is_dlo"]) if on] == [moved[i] for i in range(13) if routed[i]]
    assert changes["dlo_capacity"][moved[11]] == config["dlo_capacity"][11]
    assert changes["num_hidden_layers"] == 15
    assert "model_type" not in changes
    deepened = expanded_tensors(tensors, plan)
    assert sorted(name for name in deepened if "routers" in name) == sorted(
        f"model.routers.{moved[layer]}.weight" for layer in range(13) if routed[layer]
    )
    for layer in range(13):
        assert (
            deepened[f"model.layers.{moved[layer]}.mlp.up_proj.weight"]
            is tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        )
        if routed[layer]:
            assert deepened[f"model.routers.{moved[layer]}.weight"] is tensors[f"model.routers.{layer}.weight"]


def test_expansion_carries_earlier_layers_over_when_deepened_twice() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 4, "model_type": "llama"}
    config |= expanded_config(config, placements("tli", 4, every=2))
    changes = expanded_config(config, placements("interleave", 6, target_layers=8, init="copy"))
    # 0 1 n1 2 3 n3 becomes 0 1 n1 [c1] 2 3 n3 [c3]: the copies' sources are layers of the very first model.
    assert [tuple(entry.values()) for entry in changes["injected_layers"]] == [
        (2, 1, "zero_out"),
        (3, 1, "copy"),
        (6, 3, "zero_out"),
        (7, 3, "copy"),
    ]


def test_expansion_is_refused_when_a_list_by_layer_is_of_another_length() -> None:
    with pytest.raises(ExpansionError, match=r"config\.json has 3 entries in layer_types, expected 4[\s\S]*hint:"):
        expanded_config({"layer_types": ["full_attention"] * 3}, placements("tli", 4, every=2))


def test_expansion_routes_every_layer_when_zero_routers_are_asked_for(tmp_path: Path) -> None:
    config, tensors = open_tiny(tmp_path / "base", layers=3, dtype="bfloat16")
    save_deepened(config, tensors, placements("tli", 3, every=3), tmp_path / "deep", zero_routers=True)
    written = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert written["model_type"] == "llama_dlo_exattn"
    assert written["is_dlo"] == [True] * 4
    assert (written["rescale_hidden_states"], written["scale_factor"], written["scale_gap"]) == (False, 2.0, 0.0)
    arrays = load_file(tmp_path / "deep" / "model.safetensors")
    assert arrays["model.routers.3.weight"].shape == (1, 32)
    assert arrays["model.layers.3.mlp.up_proj.weight"].dtype == ml_dtypes.bfloat16
    with pytest.warns(UserWarning, match=r"layers \[0, 1, 2\] are all zeros"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    assert model.config.routed_layers == (0, 1, 2, 3)


@pytest.mark.parametrize("tie", [False, True])
def test_expansion_writes_shards_that_transformers_opens_when_larger_than_a_shard(tmp_path: Path, tie: bool) -> None:
    config, tensors = open_tiny(tmp_path / "base", layers=4, tie=tie)
    calls: list[tuple[int, int]] = []
    save_deepened(
        config,
        tensors,
        placements("dus", 4, overlap=1),
        tmp_path / "deep",
        max_shard_bytes=40_000,
        progress=lambda done, total: calls.append((done, total)),
    )
    shards = sorted((tmp_path / "deep").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 44_000 for path in shards)
    index = json.loads((tmp_path / "deep" / "model.safetensors.index.json").read_text())
    assert calls[-1] == (index["metadata"]["total_size"],) * 2
    assert calls == sorted(calls)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    for position, source in enumerate([0, 1, 2, 1, 2, 3]):
        up_proj = model.model.layers[position].mlp.up_proj.weight.detach().numpy()
        np.testing.assert_array_equal(up_proj, tensors[f"model.layers.{source}.mlp.up_proj.weight"].numpy())


@dataclass(frozen=True)
class CountedTensor(ArrayTensor):
    """Counts the bytes of a checkpoint that are read and not yet released; refuses to be read whole."""

    live: dict[int, int] = field(default_factory=dict)
    peak: list[int] = field(default_factory=list)

    def numpy(self) -> np.ndarray:
        raise AssertionError("read whole")

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows = self.array[start:stop]
        self.live[id(self)] = self.live.get(id(self), 0) + rows.nbytes
        self.peak.append(sum(self.live.values()))
        return rows

    def release(self) -> None:
        self.live.pop(id(self), None)


@pytest.mark.parametrize("init", LAYER_INITS)
def test_expansion_holds_at_most_two_chunks_when_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    config, tensors = open_tiny(tmp_path / "base", layers=2)
    plan = placements("interleave", 2, target_layers=4, init=init)
    save_deepened(config, tensors, plan, tmp_path / "at_once")
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 500)
    live: dict[int, int] = {}
    peak: list[int] = []
    counted = {name: CountedTensor(tensor.numpy(), live, peak) for name, tensor in tensors.items()}
    save_deepened(config, counted, plan, tmp_path / "in_chunks")
    assert 0 < max(peak) <= 2 * 500
    assert not live
    whole, chunked = (load_file(tmp_path / name / "model.safetensors") for name in ("at_once", "in_chunks"))
    assert whole.keys() == chunked.keys()
    for name, array in whole.items():
        # The angle of slerp is a sum of chunks; all else is the same to the bit.
        np.testing.assert_allclose(chunked[name], array, rtol=1e-5 if "slerp" in init else 0, err_msg=name)


def test_expansion_routes_whole_layers_when_asked(tmp_path: Path) -> None:
    config, tensors = open_tiny(tmp_path / "plain", layers=2)
    plan = placements("tli", 2, every=2)
    assert expanded_config(config, plan, zero_routers=True, routing="layer")["model_type"] == "llama_dlo"
    adapter = expansion_adapter(tensors, plan, zero_routers=True, routing="layer")
    assert (adapter.routing, adapter.routed_layers) == ("layer", (0, 1, 2))


def test_expansion_keeps_what_routers_skip_when_the_model_has_some(tmp_path: Path) -> None:
    config, _ = open_tiny(tmp_path / "model", layers=2, routed=[True, False], model_type="llama_dlo")
    plan = placements("tli", 2, every=1)
    changes = expanded_config(config, plan)
    assert changes["is_dlo"] == [True, False, False, False]
    assert "model_type" not in changes
    assert "model_type" not in expanded_config(config, plan, zero_routers=True)
    with pytest.raises(CheckpointError, match="routing mlp was asked for, the model's routers are for routing layer"):
        expanded_config(config, plan, zero_routers=True, routing="mlp")


def test_expansion_leaves_nothing_behind_when_writing_fails(tmp_path: Path) -> None:
    config, tensors = open_tiny(tmp_path / "base", layers=2)
    tensors["model.norm.weight"] = ArrayTensor(np.ones(32, np.int64))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype int64"):
        save_deepened(config, tensors, placements("tli", 2, every=1), tmp_path / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_expansion_raises_when_the_plan_is_another_models(tmp_path: Path) -> None:
    _, tensors = open_tiny(tmp_path, layers=2)
    with pytest.raises(ExpansionError, match=r"found tensors of layers \[0, 1\], expected 0 to 4"):
        expanded_tensors(tensors, placements("tli", 5, every=1))


@torch.no_grad()
def test_adapter_holds_only_what_is_new_when_made_from_an_expansion(tmp_path: Path) -> None:
    config, tensors = open_tiny(tmp_path / "base", layers=4, attention_bias=True)
    plan = placements("interleave", 4, target_layers=6, init="copy")
    save_adapter(expansion_adapter(tensors, plan, zero_routers=True, base_sha256="0" * 64), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    adapter.check_fits({name: tensor.shape for name, tensor in tensors.items()}, num_layers=4)
    assert (adapter.injected_layers, adapter.base_sha256) == (plan.injected_layers, "0" * 64)
    assert adapter.is_dlo == (True,) * 6
    assert {int(name.split(".")[2]) for name in adapter.tensors if "layers" in name} == {2, 5}
    deepened = expanded_tensors(tensors, plan)
    for name, tensor in adapter.layer_tensors(5).items():
        np.testing.assert_array_equal(tensor.numpy(), deepened[f"model.layers.5.{name}"].numpy())
    with pytest.raises(ExpansionError, match="the model has routers"):
        expansion_adapter(expanded_tensors(tensors, plan, zero_routers=True), placements("tli", 6, every=6))
    assert config["num_hidden_layers"] == 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{"tie": True}, {"rope": "llama3"}, {"routed": [True, False, True]}])
def test_model_from_tensors_equals_from_pretrained(tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    config, tensors = open_tiny(tmp_path, layers=3, dtype=dtype, **settings)
    if settings.get("tie"):
        tensors.pop("lm_head.weight", None)
    model = llama_dlo_from_tensors(config, tensors)
    ids = torch.arange(12).reshape(2, 6)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    np.testing.assert_allclose(model(ids).logits, expected, atol=1e-6)


def test_model_from_tensors_raises_when_tensors_are_missing(tmp_path: Path) -> None:
    config, tensors = open_tiny(tmp_path, layers=2)
    del tensors["model.norm.weight"]
    with pytest.raises(ModelTensorsError, match=r"model\.norm\.weight is missing"):
        llama_dlo_from_tensors(config, tensors)
