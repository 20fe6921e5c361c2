"""gpu_check as far as it goes without a GPU, and its parts with ONNX Runtime in the engines' place."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from benchmarks.engines.gpu_engines import forced_engines
from benchmarks.engines.gpu_latency import Latency, latency_table
from benchmarks.engines.gpu_layer_times import repeat_step
from benchmarks.engines.gpu_report import check_parity, examine, print_findings
from benchmarks.engines.gpu_skip_proof import medians, mlp_share, skip_proof
from benchmarks.engines.gpu_subject import LayerSeconds, RoutedReference, Subject
from benchmarks.gpu_check import read_artefacts
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_runner import exposed_model
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_tensorrt_model
from dlo_export.exporter.weight_file import save_weights
from dlo_export.runtimes import bench
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.static_cache_runner import StaticCacheRunner
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.static_cache.batches import StaticCacheLimits
from dlo_export.runtimes.tensorrt.engines import load_engines
from tests.runtimes.graphs import DATA, Builds, routed_builds

REPOSITORY = Path(__file__).parents[2]
MODEL, VOCAB, ROUTED = DATA / "reference_mlp_routed", 131, (0, 1, 3)
OPTIONS = TensorRtOptions("compact", max_batch=4, max_sequence=64, max_cache=128)
LIMITS = StaticCacheLimits(OPTIONS.max_cache, OPTIONS.max_batch, OPTIONS.max_sequence)
WORKLOAD = bench.Workload(prompt_tokens=8, decode_tokens=2, rounds=2, warm_up=0)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return routed_builds(MODEL, tmp_path_factory.mktemp("masked"), "masked")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 twin of a TensorRT graph."""
    folder = tmp_path_factory.mktemp("twin")
    model = build_tensorrt_model(open_source(MODEL, None), OPTIONS, ir.DataType.FLOAT)
    save_weights(model, folder / "model.onnx.data")
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _static(graph: Path, *, force: bool, options: ort.SessionOptions | None = None) -> StaticCacheRunner:
    model = exposed_model(ir.load(graph), force=True) if force else graph
    folder = graph.parent if force else None
    return StaticCacheRunner(model, weights_folder=folder, threads=1, options=options)


def _reference(builds: Builds) -> AbstractContextManager[Runner]:
    free, forced = (
        OnnxRuntimeRunner(model, weights_folder=builds.folder, threads=1) for model in (builds.scored, builds.forced)
    )
    return RoutedReference(free, forced)


def _layer_seconds(graph: Path, folder: Path, phase: str, share: float) -> LayerSeconds:
    """From ONNX Runtime's own profile: the kernels of the last runs, by node."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / f"{phase}-{share}")
    with _static(graph, force=True, options=options) as runner:
        repeat_step(runner, phase, share, prompt_tokens=8, vocab_size=VOCAB, forget=lambda: None, warm_up=1, repeats=3)
    (file,) = folder.glob(f"{phase}-{share}*.json")  # written when the session ends
    events = json.loads(file.read_text())
    first = sorted(event["ts"] for event in events if event["name"] == "model_run")[-3]
    samples: dict[str, list[float]] = {}
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= first:
            samples.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e6)
    return medians(samples)


def _subject(masked: Builds, graph: Path, folder: Path | None = None, limits: StaticCacheLimits = LIMITS) -> Subject:
    return Subject(
        "compact",
        "compact",
        "fp32",
        VOCAB,
        limits,
        functools.partial(_reference, masked),
        functools.partial(_static, graph, force=False),
        functools.partial(_static, graph, force=True),
        None if folder is None else functools.partial(_layer_seconds, graph, folder),
    )


def test_findings_pass_when_the_candidate_agrees(
    masked: Builds, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examine(_subject(masked, graph, tmp_path), WORKLOAD)
    assert found.parity.verdict == "PASS"
    assert len(found.parity.cases) == 8
    assert not found.left_out
    for proof in found.proofs:  # this model's MLPs take a few microseconds: names count here, not durations
        assert [layer.layer for layer in proof.layers] == list(ROUTED)
        assert all(layer.kernels >= 3 and layer.active > 0 for layer in proof.layers)
        assert 0 < proof.unattributed < 1
    assert [row.skip_rate for row in found.latencies] == [0, 0.25, 0.5, 0.75, 1]
    assert [np.mean(list(row.timing.active_rate.values())) for row in found.latencies] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0], abs=0.05
    )
    print_findings("check", [found], {"workload": {"batch": 1}})
    printed = capsys.readouterr().out
    assert "parity PASS" in printed
    assert "skipping in decode: " in printed
    assert "| compact  | compact  | no " in printed
    line = json.loads(printed.splitlines()[-1])
    assert line["artefacts"][0]["latency"][2]["skip_rate"] == 0.5
    assert line["artefacts"][0]["skipping"][0]["layers"][0]["layer"] == 0


def test_findings_fail_when_the_engine_computes_something_else(masked: Builds, graph: Path, tmp_path: Path) -> None:
    model = ir.load(graph)
    weight = model.graph.initializers["model.norm.weight"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.001), name=weight.name)
    wrong = graph.with_name("wrong.onnx")
    ir.save(model, wrong)
    found = examine(_subject(masked, wrong), WORKLOAD)
    assert (found.parity.verdict, found.verdict) == ("FAIL", "FAIL")


def test_parity_leaves_out_what_does_not_fit_when_the_engine_is_small(masked: Builds, graph: Path) -> None:
    report, left_out = check_parity(_subject(masked, graph, limits=StaticCacheLimits(128, 2, 40)))
    assert report.verdict == "PASS"
    assert [case.case for case in report.cases] == ["prefill", "chunk and decode with a cache"]
    assert "left-padded batch" in left_out
    assert "greedy tokens" in left_out
    report, left_out = check_parity(_subject(masked, graph, limits=StaticCacheLimits(128, 1, 8)))
    assert report.verdict == "NOT RUN"


def test_parity_is_not_run_when_the_engine_keeps_the_last_logits(masked: Builds, graph: Path) -> None:
    subject = Subject(**{**vars(_subject(masked, graph)), "last_logits": True})
    assert check_parity(subject)[0].verdict == "NOT RUN"
    assert examine(subject, WORKLOAD).verdict == "FAIL"


def _names(layer: int, seconds: float) -> dict[str, float]:
    return {
        f"model.layers.{layer}.mlp.gate_proj + model.layers.{layer}.mlp.up_proj": seconds / 2,
        f"__myl_Fc_model.layers.{layer}.mlp.down_proj_0x1f": seconds / 2,
    }


def test_skipping_is_proven_when_skipped_layers_take_no_time() -> None:
    rest = {"model.layers.1.self_attn.o_proj": 1e-3, "model.layers.0.mlp.x + model.layers.1.mlp.x": 1e-4}
    active = {**_names(1, 4e-4), **_names(11, 6e-4), **rest}
    proof = skip_proof("decode", active, {**_names(1, 5e-6), **rest}, (1, 11), 0.5)
    assert (proof.verdict, bool(proof)) == ("PASS", True)
    assert [layer.skipped for layer in proof.layers] == pytest.approx([5e-6, 0])
    assert proof.unattributed == pytest.approx(1.1e-3 / 2.1e-3)
    assert "worst layer 1: 5.0 µs skipped, 400.0 µs active" in proof.reason


def test_skipping_fails_when_a_skipped_layer_takes_time() -> None:
    active = {**_names(0, 4e-4), **_names(1, 4e-4)}
    proof = skip_proof("decode", active, {**_names(0, 1e-6), **_names(1, 2e-4)}, (0, 1), 0.5)
    assert (proof.verdict, bool(proof)) == ("FAIL", False)
    assert "worst layer 1: 200.0 µs skipped" in proof.reason


@pytest.mark.parametrize(("skipped", "verdict"), [(4.4e-4, "PASS"), (7e-4, "FAIL")])
def test_whole_step_is_judged_when_the_runtime_hides_layers(skipped: float, verdict: str) -> None:
    proof = skip_proof("decode", {"__myl_0": 9e-4, "__myl_1": 1e-4}, {"__myl_0": skipped}, (0, 3), 0.7)
    assert proof.verdict == verdict
    assert "no layer of the runtime is named after the MLPs of layers [0, 3]" in proof.reason
    assert "the MLPs are 70% of the weights" in proof.reason


def test_skipping_is_not_judged_when_layers_take_no_longer_than_launches() -> None:
    proof = skip_proof("decode", _names(0, 8e-6), {}, (0,), 0.5)
    assert (proof.verdict, bool(proof)) == ("NOT RUN", False)
    assert "the MLPs of layers [0] take too little time" in proof.reason
    assert skip_proof("decode", {"__myl_0": 7e-6}, {}, (0,), 0.5).verdict == "NOT RUN"


def test_mlp_share_counts_what_a_decode_step_reads(graph: Path) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_key_value_heads"] / config["num_attention_heads"]
    mlp, attention = 3 * hidden * inner, hidden * hidden * (2 + 2 * heads)
    total = layers * (mlp + attention) + hidden * VOCAB
    assert mlp_share(ir.load(graph), ROUTED) == pytest.approx(len(ROUTED) * mlp / total, rel=0.03)  # norms, constants


def _timing(prefill: float, decode: float) -> bench.Timing:
    return bench.Timing(np.array([prefill]), np.array([decode]), {})


def test_table_compares_with_the_dense_engine_when_one_was_given() -> None:
    rows = [
        Latency("plugin", "plugin", 0.0, _timing(0.02, 0.004), "captured"),
        Latency("plugin", "plugin", 1.0, _timing(0.01, 0.002), "captured"),
    ]
    header, cells = latency_table(rows)
    assert header[-1] == "decode, times 0 % skipped"
    assert [row[-2:] for row in cells] == [["1.00", "1.00"], ["2.00", "2.00"]]
    header, cells = latency_table([*rows, Latency("dense", "none", None, _timing(0.03, 0.003), "none")])
    assert header[-1] == "decode, times dense"
    assert [row[2:4] + row[-2:] for row in cells] == [
        ["yes", "0%", "1.50", "0.75"],
        ["yes", "100%", "3.00", "1.50"],
        ["no", "", "1.00", "1.00"],
    ]


def test_engines_that_take_decisions_are_built_when_released_ones_hide_theirs(artefact: Path, tmp_path: Path) -> None:
    released = load_engines(artefact)
    before = sorted(artefact.rglob("*"))
    (forced,) = forced_engines(released, tmp_path, "sm89", Reporter())
    interface = forced.static_cache
    assert interface.routed_layers == interface.forced_layers == interface.scored_layers == (0, 1)
    assert (forced.lowering, forced.dtype, forced.build.targets) == ("compact", "fp16", ("sm89",))
    assert forced.profiles[1].shapes["force_active.1"] == ((1, 1), (1, 1), (OPTIONS.max_batch, 1))
    assert forced.file.stat().st_size > 0
    assert sorted(artefact.rglob("*")) == before


def test_command_ends_with_4_at_its_first_gpu_call_when_there_is_no_gpu(artefact: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", str(artefact), "--prompt-tokens", "32"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert result.returncode == 4, result.stderr
    assert result.stdout == ""
    assert "compact: model.engine, compact, fp16, rtx " in result.stderr
    assert "error: TensorRT: no GPU can be used: cudaGetDeviceCount failed" in result.stderr
    assert "hint: run it on a machine with an NVIDIA GPU" in result.stderr


def test_artefacts_are_refused_when_names_repeat_or_files_changed(artefact: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(artefact, tmp_path / artefact.name)
    with (changed / "engines/model.onnx.data").open("r+b") as weights:
        weights.write(b"changed")
    with pytest.raises(InputError) as info:
        read_artefacts([artefact, changed], bench.Workload(8, 65, 64))
    assert "compact: is the name of 2 artefacts" in str(info.value)
    assert "engines/model.onnx.data: was changed: its sha256 is" in str(info.value)
    assert "--batch 8: it was exported with --trt-max-batch 4" in str(info.value)
    assert "--prompt-tokens 65: it was exported with --trt-max-sequence 64" in str(info.value)
    assert "--prompt-tokens and --decode-tokens 129: it was exported with --trt-max-cache 128" in str(info.value)
