import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import AdapterError, DloAdapter, InjectedLayer, load_adapter, save_adapter
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.files.whole_folder import FolderExistsError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER

HIDDEN, QUERY, KV, INTERMEDIATE = 8, 12, 4, 16
SIZES = {"hidden": HIDDEN, "query": QUERY, "key-value": KV, "intermediate": INTERMEDIATE}
SHAPES = {name: tuple(SIZES[axis] for axis in LLAMA_LAYER.axes[name]) for name in LLAMA_LAYER.required}


def make_adapter(dtype: type = np.float32) -> DloAdapter:
    """Three layers, the last one injected, the first and the last routed."""
    rng = np.random.default_rng(0)
    arrays = {f"model.layers.2.{role}": rng.standard_normal(shape).astype(dtype) for role, shape in SHAPES.items()}
    arrays |= {f"model.routers.{layer}.weight": rng.standard_normal((1, HIDDEN)).astype(np.float32) for layer in (0, 2)}
    return DloAdapter(
        routing="mlp",
        is_dlo=(True, False, True),
        rescale_hidden_states=True,
        scale_factor=2.0,
        scale_gap=0.05,
        injected_layers=(InjectedLayer(position=2, source=1, init="zero_out"),),
        base_sha256="ab" * 32,
        tensors={name: ArrayTensor(array) for name, array in arrays.items()},
    )


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_adapter_round_trips_when_saved(tmp_path: Path, dtype: type) -> None:
    adapter = make_adapter(dtype)
    save_adapter(adapter, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert replace(loaded, tensors={}) == replace(adapter, tensors={})
    assert loaded.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert loaded.tensors[name].shape == tensor.shape
        assert loaded.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(loaded.tensors[name].numpy(), tensor.numpy())
    assert loaded.routed_layers == (0, 2)
    assert (loaded.num_layers, loaded.num_base_layers) == (3, 2)
    assert set(loaded.layer_tensors(2)) == set(LLAMA_LAYER.required)
    assert loaded.router(0).shape == (1, HIDDEN)


def test_adapter_round_trips_in_a_format_of_its_own_when_it_has_thresholds(tmp_path: Path) -> None:
    save_adapter(replace(make_adapter(), router_thresholds={2: 0.25, 0: 0.4}), tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    threshold = float(np.float32(0.4))
    assert (written["format_version"], written["router_thresholds"]) == (2, {"0": 0.4, "2": 0.25})
    assert load_adapter(tmp_path / "adapter").router_thresholds == {0: threshold, 2: 0.25}


def test_adapter_config_has_the_documented_fields_when_saved(tmp_path: Path) -> None:
    save_adapter(make_adapter(), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "format_version": 1,
        "base_sha256": "ab" * 32,
        "routing": "mlp",
        "is_dlo": [True, False, True],
        "rescale_hidden_states": True,
        "scale_factor": 2.0,
        "scale_gap": 0.05,
        "injected_layers": [{"position": 2, "source": 1, "init": "zero_out"}],
    }
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.safetensors", "adapter_config.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version is 3, expected 1 or 2"),
        ({"format_version": True}, "format_version is True, expected 1 or 2"),
        ({"router_thresholds": {"0": 0.4}}, "format_version is 1, but router_thresholds are of format 2"),
        (
            {"format_version": 2, "router_thresholds": {"1": 0.4}},
            "thresholds.1 names a layer that is not routed",
        ),
        (
            {"format_version": 2, "router_thresholds": {"0": 1.5}},
            "thresholds.0 is 1.5, expected a score above 0",
        ),
        ({"format_version": 2, "router_thresholds": [0.4]}, "router_thresholds is .*, expected dict"),
        ({"is_dlo": ...}, "is_dlo is missing"),
        ({"is_dlo": [1, 0, 1]}, r"is_dlo is \[1, 0, 1\], expected true or false for every layer"),
        ({"is_dlo": [True, True, True]}, "model.routers.1.weight is missing"),
        ({"is_dlo": [False, False, True]}, "model.routers.0.weight is unexpected: that layer is not routed"),
        ({"injected_layers": []}, "9 problems\n  - model.layers.2.input_layernorm.weight is unexpected"),
        (
            {"injected_layers": [{"position": 3, "source": 0, "init": "copy"}]},
            "position is 3, expected an integer from",
        ),
        (
            {"injected_layers": [{"position": 2, "source": 2, "init": "copy"}]},
            "source is 2, expected an integer from 0",
        ),
        ({"injected_layers": [{}] * 3}, "injected_layers has 3 entries, expected fewer than the 3 layers"),
        ({"injected_layers": [{"position": 2, "source": 0, "init": "stack"}]}, "init: layer init: found 'stack'"),
        ({"routing": "token"}, 'routing is \'token\', expected "mlp" or "layer"'),
        ({"scale_gap": True}, "scale_gap is True, expected int or float"),
        ({"scale_factor": float("nan")}, "scale_factor is nan, expected a finite number"),
        ({"scale_factor": 10**400}, "scale_factor is 1000.*, expected a finite number"),
        ({"scale_gap": -1e39}, r"scale_gap is -1e\+39, expected a finite number"),
        ({"base_sha256": "abc"}, "base_sha256 is 'abc', expected 64 hexadecimal digits"),
        ({"lora_alpha": 16}, "lora_alpha is not a field of an adapter"),
    ],
)
def test_load_adapter_names_the_field_when_config_is_wrong(tmp_path: Path, changes: dict, message: str) -> None:
    save_adapter(make_adapter(), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **changes)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(tmp_path / "adapter")
    assert "\n\nhint: " in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_load_adapter_refuses_a_file_when_it_is_a_link_that_leads_out(tmp_path: Path, name: str) -> None:
    save_adapter(make_adapter(), tmp_path / "adapter")
    (tmp_path / "adapter" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "adapter" / name).symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=rf"adapter/{name}: leads to .*elsewhere, outside its folder"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_load_adapter_raises_when_a_file_is_missing_or_truncated(tmp_path: Path, name: str) -> None:
    save_adapter(make_adapter(), tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterError, match=name):
        load_adapter(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(AdapterError, match=f"{name} not found"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("model.routers.0.weight", np.ones(HIDDEN, np.float32), r"has shape \[8\], expected \[1, hidden\]"),
        ("model.routers.0.weight", np.ones((1, 9), np.float32), "has hidden size 9, but .* has 8"),
        ("model.routers.0.weight", np.full((1, HIDDEN), np.nan, np.float32), "holds values that are not finite"),
        (
            "model.layers.2.mlp.up_proj.weight",
            np.ones((15, HIDDEN), np.float32),
            "up_proj.weight has intermediate size",
        ),
        ("model.layers.1.mlp.up_proj.weight", np.ones((16, HIDDEN), np.float32), "that layer is not injected"),
    ],
)
def test_save_adapter_writes_nothing_when_tensors_are_inconsistent(
    tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    adapter = make_adapter()
    broken = replace(adapter, tensors={**adapter.tensors, name: ArrayTensor(array)})
    with pytest.raises(AdapterError, match=message):
        save_adapter(broken, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_save_adapter_leaves_no_folder_when_writing_fails(tmp_path: Path) -> None:
    adapter = make_adapter()
    wrong_type = ArrayTensor(np.ones((QUERY, HIDDEN), np.int32))
    with pytest.raises(InputError, match="dtype int32"):
        save_adapter(
            replace(adapter, tensors={**adapter.tensors, "model.layers.2.self_attn.q_proj.weight": wrong_type}),
            tmp_path / "adapter",
        )
    assert not list(tmp_path.iterdir())


def test_save_adapter_replaces_a_folder_only_when_told_to(tmp_path: Path) -> None:
    save_adapter(make_adapter(), tmp_path / "adapter")
    with pytest.raises(FolderExistsError, match="not empty"):
        save_adapter(make_adapter(), tmp_path / "adapter")
    save_adapter(replace(make_adapter(), scale_gap=0.5), tmp_path / "adapter", overwrite=True)
    assert load_adapter(tmp_path / "adapter").scale_gap == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_check_fits_lists_every_difference_when_the_model_is_another() -> None:
    shapes = {f"model.layers.0.{role}": shape for role, shape in SHAPES.items()} | {"model.norm.weight": (HIDDEN,)}
    make_adapter().check_fits(shapes, num_layers=2)
    shapes["model.layers.0.mlp.up_proj.weight"] = (32, HIDDEN)
    with pytest.raises(AdapterError, match="has 3 layers, the adapter goes on 2") as caught:
        make_adapter().check_fits(shapes, num_layers=3)
    assert "model.layers.2.mlp.up_proj.weight: found [16, 8], the model needs [32, 8]" in str(caught.value)
