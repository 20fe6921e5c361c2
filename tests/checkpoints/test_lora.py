"""LoRA adapters of PEFT's: merged as PEFT merges them, or refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlo_export.checkpoints.adapter.adapter import AdapterError
from dlo_export.checkpoints.adapter.lora import load_lora, merged_sha256
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.calibrate import CalibrationRequest, calibrate
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings
from tests.foreign_graphs import save_foreign_graph
from tests.tiny_models import save_tiny_llama

RANK, ALPHA = 4, 6
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": None,
    "megatron_core": "megatron.core",
    "lora_dropout": 0.1,
}
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (32, 32), DOWN: (32, 56)}


def save_lora(folder: Path, *, more: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """Writes an adapter on two projections of a tiny Llama, as PEFT does."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    rng = np.random.default_rng(0)
    tensors = {}
    for module, (rows, columns) in SHAPES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((RANK, columns), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((rows, RANK), np.float32)
    save_file(tensors | (more or {}), folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, (ALPHA / RANK, ALPHA / RANK)),
        ({"use_rslora": True}, (ALPHA / 2, ALPHA / 2)),
        ({"lora_alpha": 0.5}, (0.5 / RANK, 0.5 / RANK)),
        ({"alpha_pattern": {"q_proj": 10}}, (10 / RANK, ALPHA / RANK)),
        ({"r": 8, "rank_pattern": {"q_proj|down_proj": RANK}}, (ALPHA / RANK, ALPHA / RANK)),
    ],
)
def test_weights_are_merged_when_a_folder_is_lora(tmp_path: Path, model: Path, changes: Any, scales: Any) -> None:
    folder = save_lora(tmp_path / "lora", **changes)
    source = open_source(model, folder)
    base, factors = load_file(model / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    for module, scale in zip(SHAPES, scales, strict=True):
        a, b = (factors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        merged = source.tensors()[f"{module}.weight"]
        expected = base[f"{module}.weight"] + np.float64(scale) * b.astype(np.float64) @ a
        assert (merged.shape, merged.dtype, merged.nbytes) == (expected.shape, np.float32, expected.size * 4)
        np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(merged.rows(3, 9), merged.numpy()[3:9])
    untouched = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(source.tensors()[untouched].numpy(), base[untouched])


def test_saved_modules_take_the_place_of_the_base_s_when_the_adapter_has_them(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", attention_bias=True)
    new = {"lm_head.weight": np.ones((97, 32), np.float32), "model.norm.weight": np.full(32, 3, np.float32)}
    bias = {f"base_model.model.{Q}.base_layer.bias": np.arange(32, dtype=np.float32)}
    more = {f"base_model.model.{name}": tensor for name, tensor in new.items()} | bias
    source = open_source(
        model, save_lora(tmp_path / "lora", more=more, modules_to_save=["lm_head", "norm"], bias="all")
    )
    for name, tensor in new.items():
        np.testing.assert_array_equal(source.tensors()[name].numpy(), tensor)
    np.testing.assert_array_equal(source.tensors()[f"{Q}.bias"].numpy(), np.arange(32))


@pytest.mark.parametrize("routed", [None, [True, False, True]])
def test_artefact_is_equal_to_the_merged_model_when_lora_is_its_adapter(tmp_path: Path, routed: Any) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=routed, dtype="bfloat16")
    folder = save_lora(tmp_path / "lora")
    result = export_model(ExportRequest(str(model), tmp_path / "out", adapter=folder), Reporter())
    assert result.description.parity.verdict == "PASS"
    assert (result.description.source.adapter, result.description.source.adapter_base) == ("lora", "not stated")
    assert result.description.source.sha256 not in (open_source(model, None).base.sha256(), "")


def test_identity_of_merged_weights_is_of_both_files() -> None:
    assert merged_sha256("ab", "cd") == hashlib.sha256(b"ab\ncd\n").hexdigest()


def _factor(module: str, letter: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {f"base_model.model.{module}.lora_{letter}.weight": np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"peft_type": "IA3"}, {}, "kind 'IA3'"),
        ({"peft_type": "PROMPT_TUNING"}, {}, "kind 'PROMPT_TUNING'"),
        ({"use_dora": True}, {}, "DoRA rescales"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, {}, "layer_replication is set"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices is set"),
        ({"of_the_future": "yes"}, {}, "of_the_future is set"),
        ({"r": 0}, {}, "r is 0"),
        ({"r": 8}, {}, "expected rank 8"),
        ({"r": 10**400}, {}, "r is 1000.*, expected a number above 0"),
        ({"lora_alpha": 10**400}, {}, "lora_alpha is 1000.*, expected a number above 0"),
        ({"lora_alpha": 1e39}, {}, r"lora_alpha is 1e\+39, expected a number above 0"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, {}, "alpha_pattern is .*inf.*, expected numbers above 0"),
        ({"rank_pattern": {"q_proj": 0}}, _factor(Q, "A", (0, 32)) | _factor(Q, "B", (32, 0)), "numbers above 0"),
        ({"rank_pattern": [RANK]}, {}, r"rank_pattern is \[4\], expected numbers above 0 by module"),
        ({"alpha_pattern": {"(": 1}}, {}, r"lora: alpha_pattern: '\(' is no pattern"),
        ({"rank_pattern": {"a{99999999999}": 1}}, {}, r"lora: rank_pattern: 'a\{9+\}' is no pattern"),
        ({"rank_pattern": {"(" * 9999: 1}}, {}, "is no pattern"),
        ({}, {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(32, np.float32)}, "no A or B of a projection"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 97), np.float32)}, "no A or B"),
        ({}, _factor("lm_head", "A", (4, 32)) | _factor("lm_head", "B", (97, 4)), "only the projections"),
        ({}, _factor("model.norm", "A", (4, 32)) | _factor("model.norm", "B", (97, 4)), "only the projections"),
        ({}, _factor("model.layers.0.input_layernorm", "A", (4, 32))
         | _factor("model.layers.0.input_layernorm", "B", (32, 4)), "only the projections"),
        ({}, _factor(Q, "B", (32, 5)), r"A is \[4, 32\] and B \[32, 5\], expected rank 4"),
        ({}, _factor(Q, "A", ()), r"A is \[\] and B \[32, 4\], expected rank 4"),
        ({}, {f"{Q}.lora_B.weight": np.ones((32, 4), np.float32)}, "lora_B.weight is stored twice"),
        ({}, {f"base_model.model.{Q}.base_layer.lora_A.weight": np.ones((4, 32), np.float32)}, "is stored twice"),
        ({}, _factor(Q, "B", (32, 4, 1)), r"A is \[4, 32\] and B \[32, 4, 1\], expected rank 4"),
        ({}, _factor("model.layers.2.mlp.up_proj", "A", (4, 32)), r"up_proj\.lora_B\.weight is missing"),
        ({}, _factor(Q, "A", (4, 16)), r"B·A is \[32, 16\], the model's is \[32, 32\]"),
        ({}, {"base_model.model.lm_head.weight": np.ones((98, 32), np.float32)}, r"weight is \[98, 32\], the mo"),
        ({}, {"base_model.model.model.layers.1.self_attn.q_proj.bias": np.ones(32, np.float32)}, "is not in the model"),
        ({}, _factor(Q, "A", (4, 32)) | _factor("model.layers.3.mlp.up_proj", "A", (4, 32))
         | _factor("model.layers.3.mlp.up_proj", "B", (56, 4)), r"layers\.3\.mlp\.up_proj\.weight is not in the model"),
    ],
)  # fmt: skip
def test_adapter_is_refused_by_name_when_it_cannot_be_merged(
    tmp_path: Path, model: Path, changes: Any, more: Any, words: str
) -> None:
    folder = save_lora(tmp_path / "lora", more=more, **changes)
    with pytest.raises(AdapterError, match=words) as info:
        open_source(model, folder)
    assert info.value.hint


def test_trained_embedding_is_refused_when_the_head_that_is_tied_to_it_would_be_another(tmp_path: Path) -> None:
    """PEFT trains a copy, and the head stays the base's: no tied model computes that."""
    tied, untied = (save_tiny_llama(tmp_path / name, tie=name == "tied") for name in ("tied", "untied"))
    embedding, head = (f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head"))
    ones = np.ones((97, 32), np.float32)
    for number, saved in enumerate(({embedding: ones}, {head: ones}, {embedding: ones, head: 2 * ones})):
        folder = save_lora(tmp_path / str(number), more=saved, modules_to_save=["embed_tokens", "lm_head"])
        with pytest.raises(AdapterError, match=r"embed_tokens\.weight and lm_head\.weight are one matrix in the model"):
            open_source(tied, folder)
        assert open_source(untied, folder)
    same = open_source(tied, save_lora(tmp_path / "same", more={embedding: ones, head: ones.copy()}))
    assert "lm_head.weight" not in same.tensors()
    np.testing.assert_array_equal(same.tensors()["model.embed_tokens.weight"].numpy(), ones)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_is_refused_when_a_file_is_a_link_that_leads_out(tmp_path: Path, model: Path, name: str) -> None:
    folder = save_lora(tmp_path / "lora")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    with pytest.raises(InputError, match=rf"lora/{name}: leads to .*elsewhere, outside its folder"):
        open_source(model, folder)


def test_adapter_is_refused_when_a_value_is_not_finite(tmp_path: Path, model: Path) -> None:
    folder = save_lora(tmp_path / "lora", more=_factor(Q, "B", (32, 4)))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q}.lora_B.weight"][31, 2] = np.inf
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.lora_B\.weight\[31, 2\] is inf"):
        export_model(ExportRequest(str(model), tmp_path / "out", adapter=folder, parity=False), Reporter())
    assert not (tmp_path / "out").exists()
    allowed = ExportRequest(str(model), tmp_path / "out", adapter=folder, parity=False, allow_nonfinite=True)
    assert export_model(allowed, Reporter()).folder.is_dir()


def test_merged_weight_is_refused_when_it_overflows_though_its_parts_do_not(tmp_path: Path, model: Path) -> None:
    folder = save_lora(tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    for letter in "AB":
        tensors[f"base_model.model.{Q}.lora_{letter}.weight"][:] = 1e30
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"model: model\.layers\.1\.self_attn\.q_proj\.weight\[0, 0\] is inf"):
        export_model(ExportRequest(str(model), tmp_path / "out", adapter=folder, parity=False), Reporter())


def test_pickles_graphs_and_calibration_are_refused_when_the_adapter_is_lora(tmp_path: Path, model: Path) -> None:
    folder = save_lora(tmp_path / "lora")
    with pytest.raises(InputError, match="is a graph, the LoRA adapter"):
        open_source(save_foreign_graph(tmp_path / "foreign", "fp32"), folder)
    request = CalibrationRequest(
        *(str(model), tmp_path / "out", folder, False, CalibrationSettings(), None, None, 512, 0, False)
    )
    with pytest.raises(InputError, match=r"would be calibrated under the LoRA adapter .*, which has no routers"):
        calibrate(request, Reporter())
    assert not (tmp_path / "out").exists()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors not found[\s\S]*pickles are not read"):
        load_lora(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["v_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"0.*v_proj": 9}},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["k_proj"], "bias": "all", "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_merged_weights_are_those_of_peft_when_it_is_installed(tmp_path: Path, options: Any) -> None:
    peft = pytest.importorskip("peft")
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    tied = options.get("ensure_weight_tying", False)
    model = save_tiny_llama(tmp_path / "model", attention_bias="bias" in options, tie=tied)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        peft.LoraConfig(r=5, lora_alpha=7, task_type="CAUSAL_LM", **options),
    )
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    tensors = open_source(model, tmp_path / "lora").tensors()
    assert tensors.keys() == merged.keys() - ({"lm_head.weight"} if tied else set())
    changed = 0
    base = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor.numpy(), merged[name].numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        changed += not np.array_equal(tensor.numpy(), base[name])
    assert changed
