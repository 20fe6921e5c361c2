"""Models whose MLPs the kernels of the dlo operators do not compute: refused before they are written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter import export
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.kernel_widths import kernel_width_problem
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tune import tune
from dlo_export.graph_passes.spec.ops import DOMAIN, VERSION
from dlo_export.runtimes.bench import Workload
from tests.exporter.test_cli import check_refused, dlo
from tests.plugins.ort_library import built_library
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama

WIDTHS = {"hidden": 36, "intermediate": 52, "head_dim": 8, "layers": 2}
LIBRARY = Path("libdlo_ort.so")  # looked at where its operators are to be run, and they are not


def save_routed(folder: Path) -> ExportRequest:
    return ExportRequest(str(save_tiny_llama(folder / "model", routed=(True, False), **WIDTHS)), folder / "out")  # type: ignore[arg-type]


def save_adapted(folder: Path, model: Callable[[Path], Path]) -> ExportRequest:
    """A plain checkpoint in another form, and an adapter with routers that was made of the checkpoint."""
    checkpoint = save_tiny_llama(folder / "checkpoint", **WIDTHS)  # type: ignore[arg-type]
    with open_checkpoint(checkpoint) as opened:
        plan = placements("tli", 2, every=1, init="zero_out")
        save_adapter(expansion_adapter(opened.tensors, plan, zero_routers=True), folder / "adapter")
    return ExportRequest(str(model(checkpoint)), folder / "out", adapter=folder / "adapter", force_base=True)


def as_gguf(checkpoint: Path) -> Path:
    return save_tiny_gguf(checkpoint, checkpoint.with_name("model.gguf"))


def as_graph(checkpoint: Path) -> Path:
    """As another exporter writes it, without a config.json beside it."""
    graph = checkpoint.with_name("model.onnx")
    ir.save(open_source(checkpoint, None).plain_model(ir.DataType.FLOAT), graph, external_data="weights")
    return graph


SOURCES: dict[str, Callable[[Path], ExportRequest]] = {
    "checkpoint": save_routed,
    "gguf": lambda folder: save_adapted(folder, as_gguf),
    "graph": lambda folder: save_adapted(folder, as_graph),
}


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("source", SOURCES)
def test_export_is_refused_before_it_writes_when_no_kernel_is_as_wide(
    source: str, provider: ProviderOption, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = dataclasses.replace(SOURCES[source](tmp_path), lowering="plugin", provider=provider, parity=False)
    monkeypatch.setattr(export, "whole_folder", lambda *args, **kwargs: pytest.fail("a folder is made"))
    expected = "of --lowering plugin do not take hidden_size 36 and intermediate_size 52; expected multiples of 8"
    with pytest.raises(InputError, match=expected) as error:
        export_model(request, Reporter())
    assert error.value.hint == "choose --lowering if or compact"


def test_command_ends_with_2_when_no_kernel_is_as_wide(tmp_path: Path) -> None:
    model = save_routed(tmp_path).model
    result = dlo("export", model, "-o", tmp_path / "out", "--lowering", "plugin", "--no-parity")
    check_refused(result, tmp_path, "--lowering plugin", "hidden_size 36", "choose --lowering if or compact")


@pytest.mark.parametrize("lowering", ["auto", "plugin"])
def test_captured_step_is_refused_with_what_it_can_have_when_no_kernel_is_as_wide(
    lowering: str, tmp_path: Path
) -> None:
    model = save_tiny_llama(tmp_path / "model", routed=(True,) * 3, hidden=64, intermediate=52)
    options = {"lowering": lowering, "static_cache": 32, "provider": "cuda", "parity": False}
    request = ExportRequest(str(model), tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="do not take intermediate_size 52;") as error:
        export_model(request, Reporter())
    assert error.value.hint == "choose --lowering masked, or leave --static-cache out"
    masked = export_model(dataclasses.replace(request, lowering="masked"), Reporter())
    assert masked.description.lowering == "masked"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"intermediate": 52}, "plugin is not possible: .* do not take intermediate_size 52; expected multiples of 8"),
        ({"mlp_bias": True}, "plugin is not possible: .* without biases"),
        ({}, "no shape depends on data"),
    ],
    ids=["width", "biases", "fits"],
)
def test_auto_passes_the_plugin_over_when_its_kernels_do_not_compute_the_model(
    model: dict[str, object], reason: str, tmp_path: Path
) -> None:
    checkpoint = save_tiny_llama(tmp_path / "model", routed=(True,) * 3, **model)  # type: ignore[arg-type]
    request = ExportRequest(str(checkpoint), tmp_path / "out", parity=False, provider="cuda")
    library = LIBRARY if model else built_library()
    description = export_model(dataclasses.replace(request, ort_plugin_library=library), Reporter()).description
    assert description.lowering == ("compact" if model else "plugin")
    assert re.search(reason, description.lowering_reason)


@pytest.mark.parametrize("model", [{"intermediate": 52}, {"mlp_bias": True}], ids=["width", "biases"])
def test_tuning_leaves_the_plugin_out_when_its_kernels_do_not_compute_the_model(
    model: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny_llama(tmp_path / "model", routed=(True,) * 3, **model)  # type: ignore[arg-type]
    export_model(ExportRequest(str(checkpoint), tmp_path / "out", parity=False), Reporter())
    workload = Workload(batch=1, prompt_tokens=4, decode_tokens=1, rounds=1)
    description = open_description(tmp_path / "out")
    tuned = tune(tmp_path / "out", description, range(8), workload, Reporter(), plugin_library=built_library())
    assert set(tuned.timings) == {"compact", "if"}
    assert "warning: plugin: is left out: " in capsys.readouterr().err


def test_codes_may_be_as_wide_as_they_are_when_only_their_rows_are_gathered() -> None:
    graph = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23, "{DOMAIN}" : {VERSION}]>\n'
        "graph (float[b,s,16] x, float[b,s,52] v) => (float[b,s] scores, int64[n,2] i, float[n,52] rows) "
        "<float[16,1] w, float t = {0.5}> "
        f"{{scores, i, rows = {DOMAIN}.GatherActive (x, w, t, v)}}"
    ).graph
    assert kernel_width_problem(graph) is None
