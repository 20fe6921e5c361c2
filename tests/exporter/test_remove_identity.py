"""Layers that pass everything on, left out of an artefact that is proven equal to the model with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from dlo_export.checkpoints.adapter.adapter import load_adapter, save_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import parse_router
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.reduced_source import without_layers
from dlo_export.exporter.sources.source import open_source
from dlo_export.graph_passes.depth.remove_identity_layers import RemoveIdentityLayersPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.exporter.forked_commands import run as dlo
from tests.exporter.test_cli import check_refused
from tests.tiny_families import save_tiny_family
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

LAYERS, IDENTITY = 3, (1, 3, 5)
KEPT = (0, 2, 4)


def routed_adapter(base: Path, folder: Path, routing: RoutingKind) -> Path:
    """Identity layers behind every layer, a router of its own for all but one."""
    result = dlo("expand", base, "-o", folder / "deep", "--every", 1, "--routers", "--routing", routing, "--adapter")
    assert result.returncode == 0, result.stderr
    adapter, rng = load_adapter(folder / "deep"), np.random.default_rng(0)
    tensors = {
        name: tensor if parse_router(name) is None else ArrayTensor(rng.standard_normal((1, 32)).astype("float32"))
        for name, tensor in adapter.tensors.items()
        if parse_router(name) != 2
    }
    is_dlo = tuple(layer != 2 for layer in range(2 * LAYERS))
    routed = dataclasses.replace(adapter, is_dlo=is_dlo, router_thresholds={1: 0.25, 4: 0.625}, tensors=tensors)
    save_adapter(routed, folder / "routed")
    return folder / "routed"


@pytest.mark.parametrize("routing", ["mlp", "layer", "attention-active"])
def test_artefact_equals_the_whole_model_when_identity_layers_are_removed(tmp_path: Path, routing: RoutingKind) -> None:
    base = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY)
    adapter = routed_adapter(base, tmp_path, routing)
    request = ExportRequest(str(base), tmp_path / "out", adapter=adapter, remove_identity=True)
    description = export_model(request, Reporter()).description
    assert description.parity.verdict == "PASS"
    assert description.source.removed_layers == IDENTITY
    assert [(layer.index, layer.injected, layer.identity) for layer in description.layers] == [
        (index, False, False) for index in range(LAYERS)
    ]
    assert description.routed_layers == (0, 2)
    assert description.router_thresholds == {2: 0.625}
    # What says how it is computed says it of the layers that are there.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["is_dlo"], config["injected_layers"]) == (3, [True, False, True], [])
    caches = {spec.name for spec in description.interface.inputs if spec.name.startswith("past_key_values")}
    assert len(caches) == 2 * LAYERS
    again = dlo("parity", tmp_path / "out", base, "--adapter", adapter)
    assert again.returncode == 0, again.stderr


def test_artefact_opens_when_a_layer_was_removed_that_was_not_injected(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", layers=4, vocab=BYTE_VOCABULARY)
    tensors = load_file(model / "model.safetensors")
    for end in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{end}.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    injected = {"position": 3, "source": 2, "init": "copy"}
    (model / "config.json").write_text(json.dumps(config | {"injected_layers": [injected]}))

    request = ExportRequest(str(model), tmp_path / "out", remove_identity=True)
    description = export_model(request, Reporter()).description
    assert (description.source.removed_layers, description.parity.verdict) == ((0,), "PASS")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["injected_layers"] == [injected | {"position": 2}]
    with open_artefact(tmp_path / "out") as runner, TorchRunner.from_folder(model) as reference:
        found, wanted = (generate(each, [[5, 9, 200]], max_new_tokens=4) for each in (runner, reference))
    assert found.sequences == wanted.sequences


def test_checkpoint_goes_on_as_before_when_its_identity_layers_are_removed(tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "smollm3")
    made = dlo("expand", tmp_path / "model", "-o", tmp_path / "deep", "--every", 2)
    assert made.returncode == 0, made.stderr
    result = dlo("export", tmp_path / "deep", "-o", tmp_path / "out", "--remove-identity")
    assert (result.returncode, "since they pass everything on: layers 2, 5 of the source" in result.stdout) == (0, True)
    assert load_description(tmp_path / "out").parity.verdict == "PASS"
    shown = " ".join(dlo("inspect", tmp_path / "out").stdout.split())
    assert "without its layers 2, 5, which pass everything on" in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["no_rope_layers"], config["injected_layers"]) == ([1, 0, 1, 0], [])
    prompts = [[5, 9, 200, 31, 7], [77, 3]]
    with open_artefact(tmp_path / "out") as runner, TorchRunner.from_folder(tmp_path / "model") as reference:
        found, wanted = (generate(each, prompts, max_new_tokens=8) for each in (runner, reference))
    assert found.sequences == wanted.sequences


def test_identity_layers_go_when_norms_stand_behind_their_projections(tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "olmo2")
    assert dlo("expand", tmp_path / "model", "-o", tmp_path / "deep", "--every", 2).returncode == 0
    request = ExportRequest(str(tmp_path / "deep"), tmp_path / "out", remove_identity=True)
    description = export_model(request, Reporter()).description
    assert (description.source.removed_layers, description.parity.verdict) == ((2, 5), "PASS")
    # Without an epsilon a norm makes no numbers of zeros.
    model = open_source(str(tmp_path / "deep"), None).base.plain_model(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
    with pytest.raises(GraphPassError, match=r"layer 2: RMSNormalization .* stands between self_attn\.o_proj\.weight"):
        RemoveIdentityLayersPass((2,))(model)


def test_export_says_so_when_there_is_no_identity_layer_to_remove(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY)
    result = dlo("export", model, "-o", tmp_path / "out", "--remove-identity", "--no-parity")
    assert (result.returncode, "no layer passes everything on" in result.stderr) == (0, True), result.stderr
    assert load_description(tmp_path / "out").source.removed_layers == ()


def test_removal_is_refused_by_name_when_a_layer_changes_something_or_none_would_be_left(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, layers=2)
    source = open_source(str(model), None)
    with pytest.raises(InputError, match=r"layers \[1\] do not pass everything on, and cannot be removed"):
        without_layers(source, [1])
    file = model / "model.safetensors"
    ends = ("o_proj.weight", "down_proj.weight")
    save_file({name: 0 * value if name.endswith(ends) else value for name, value in load_file(file).items()}, file)
    result = dlo("export", model, "-o", tmp_path / "out", "--remove-identity")
    check_refused(result, tmp_path, "every layer passes everything on", "leave --remove-identity out")


@pytest.mark.parametrize("engines", [(), ("--trt",)], ids=["", "trt"])
def test_lowering_is_refused_by_name_when_every_routed_layer_is_removed(
    tmp_path: Path, engines: tuple[str, ...]
) -> None:
    base = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY)
    (tmp_path / "made").mkdir()
    made = load_adapter(routed_adapter(base, tmp_path / "made", "mlp"))
    kept = {name: value for name, value in made.tensors.items() if parse_router(name) in (None, *IDENTITY)}
    is_dlo = tuple(layer in IDENTITY for layer in range(made.num_layers))
    new_only = dataclasses.replace(made, is_dlo=is_dlo, router_thresholds={}, tensors=kept)
    save_adapter(new_only, tmp_path / "new")
    options = (tmp_path / "model", "-o", tmp_path / "out", "--adapter", tmp_path / "new", "--remove-identity")
    result = dlo("export", *options, "--lowering", "compact", *engines)
    check_refused(result, tmp_path, "every routed layer passes everything on", "leave one of the two options out")
    assert dlo("export", *options).returncode == 0, "the model that is left is a plain one"
