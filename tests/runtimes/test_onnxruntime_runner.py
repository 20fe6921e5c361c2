from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlo_export.runtimes.errors import ModelInterfaceError, ModelLoadError, StepError
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from tests.runtimes.feeding import feed, joined_logits, joined_scores, reference_samples
from tests.runtimes.graphs import DATA, Builds

ROUTED = (0, 1, 3)


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int64)


@pytest.mark.parametrize("cached", [0, 3])
def test_runner_matches_the_authors_when_samples_are_left_padded(
    builds: Builds, expected: np.lib.npyio.NpzFile, cached: int
) -> None:
    samples = reference_samples(expected)
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        assert (runner.num_layers, runner.routed_layers) == (4, ())
        results, _ = feed(runner, samples, cached)
    logits = joined_logits(results)
    for row, sample in enumerate(samples):
        np.testing.assert_allclose(logits[row, -sample.shape[1] :], expected[f"logits_{row}"][0], atol=1e-4, rtol=0)


def test_runner_returns_the_authors_decisions_when_scores_are_exposed(
    builds: Builds, expected: np.lib.npyio.NpzFile
) -> None:
    samples = reference_samples(expected)
    with OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1) as runner:
        assert runner.routed_layers == ROUTED
        scores = joined_scores(feed(runner, samples, 3)[0])
    for row, sample in enumerate(samples):
        active = np.stack([scores[layer][row, -sample.shape[1] :] > 0.5 for layer in ROUTED])
        np.testing.assert_array_equal(active, expected[f"active_{row}"][:, 0])


def test_runner_obeys_decisions_when_they_are_forced(builds: Builds, expected: np.lib.npyio.NpzFile) -> None:
    samples = reference_samples(expected)[:1]
    authors = {layer: expected["active_0"][i] for i, layer in enumerate(ROUTED)}
    others = {layer: ~active for layer, active in authors.items()}
    with OnnxRuntimeRunner(builds.forced, weights_folder=builds.folder, threads=1) as runner:
        same = joined_logits(feed(runner, samples, 2, force=authors)[0])
        different = joined_logits(feed(runner, samples, 2, force=others)[0])
    np.testing.assert_allclose(same, expected["logits_0"], atol=1e-4, rtol=0)
    assert np.abs(different - expected["logits_0"]).max() > 1e-2


def test_runner_starts_over_when_reset_with_another_batch(builds: Builds, expected: np.lib.npyio.NpzFile) -> None:
    samples = reference_samples(expected)
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        feed(runner, samples, 3)
        again = joined_logits(feed(runner, samples[1:2], 2)[0])
    np.testing.assert_allclose(again, expected["logits_1"], atol=1e-4, rtol=0)


def test_runner_keeps_the_last_row_only_when_last_logits_are_asked_for(
    builds: Builds, expected: np.lib.npyio.NpzFile
) -> None:
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        (result,), _ = feed(runner, reference_samples(expected)[:1], last_logits=True)
    assert result.logits.shape == (1, 1, 131)
    assert result.logits.base is None
    np.testing.assert_allclose(result.logits[0, 0], expected["logits_0"][0, -1], atol=1e-4, rtol=0)


def test_results_stay_valid_when_the_runner_is_closed(builds: Builds, expected: np.lib.npyio.NpzFile) -> None:
    with OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1) as runner:
        first, _ = feed(runner, reference_samples(expected)[:1])
        for _ in range(5):
            feed(runner, reference_samples(expected)[1:2])
    gc.collect()
    np.testing.assert_allclose(first[0].logits, expected["logits_0"], atol=1e-4, rtol=0)
    with pytest.raises(StepError, match="closed"):
        runner.step(_ones(1, 1), _ones(1, 13), _ones(1, 1))


def test_runner_takes_optimums_graph_when_given_its_file() -> None:
    folder = DATA / "optimum_llama"
    with np.load(folder / "expected.npz") as data, OnnxRuntimeRunner(folder / "model.onnx", threads=1) as runner:
        ids, logits = data["input_ids"], data["logits"]
        cached = joined_logits(feed(runner, [ids[:1]], 2)[0])
    np.testing.assert_allclose(cached[0], logits[0], atol=1e-4, rtol=0)


def test_runner_feeds_what_the_graph_has_when_it_lacks_mask_and_positions(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(_running_sum(tmp_path), threads=1) as runner:
        runner.reset(2)
        runner.step(np.array([[3, 4], [5, 6]]), _ones(2, 2), _ones(2, 2), last_logits=True)  # it has no others
        result = runner.step(np.array([[5], [7]]), _ones(2, 3), _ones(2, 1))
    np.testing.assert_array_equal(result.logits[:, 0, 0], [12, 18])


def test_runner_reports_everything_when_the_interface_is_wrong(tmp_path: Path) -> None:
    model = onnx.load(_running_sum(tmp_path))
    model.graph.output[1].name = "cache"
    model.graph.node[2].output[0] = "cache"
    model.graph.node[4].input[0] = "cache"
    model.graph.input.append(helper.make_tensor_value_info("temperature", TensorProto.FLOAT, [1]))
    with pytest.raises(ModelInterfaceError) as error:
        OnnxRuntimeRunner(model.SerializeToString())
    for part in ("present.0.key", "temperature", "hint:"):
        assert part in str(error.value)


def test_runner_says_so_when_the_caches_head_size_is_not_in_the_graph(tmp_path: Path) -> None:
    model = onnx.load(_running_sum(tmp_path))
    model.graph.input[1].type.tensor_type.shape.dim[3].dim_param = "head_dim"
    with pytest.raises(ModelInterfaceError, match=r"past_key_values.0.key has shape.*kv_heads and head_dim"):
        OnnxRuntimeRunner(model.SerializeToString())


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_runner_raises_load_error_when_the_file_is_missing_or_damaged(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        OnnxRuntimeRunner(path)


def test_runner_raises_load_error_when_external_data_is_missing(builds: Builds, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="external data"):
        OnnxRuntimeRunner(builds.scored, weights_folder=tmp_path)


def test_step_raises_when_arguments_do_not_fit(builds: Builds) -> None:
    with OnnxRuntimeRunner(builds.forced, weights_folder=builds.folder, threads=1) as runner:
        with pytest.raises(StepError, match="before reset"):
            runner.step(_ones(1, 1), _ones(1, 1), _ones(1, 1))
        runner.reset(1)
        with pytest.raises(StepError, match="got none"):
            runner.step(_ones(1, 1), _ones(1, 1), _ones(1, 1))
        with pytest.raises(StepError, match=r"input_ids has shape \[2, 1\].*layers \[0\], expected \[0, 1, 3\]"):
            runner.step(_ones(2, 1), _ones(2, 1), _ones(2, 1), force_active={0: np.ones((1, 1), bool)})
        with pytest.raises(StepError, match=r"attention_mask has shape \[1, 1\], expected \[1, 2\]"):
            runner.step(
                _ones(1, 2), _ones(1, 1), _ones(1, 2), force_active={layer: np.ones((1, 2), bool) for layer in ROUTED}
            )
    with OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1) as runner:
        runner.reset(1)
        with pytest.raises(StepError, match="cannot be given"):
            runner.step(
                _ones(1, 1), _ones(1, 1), _ones(1, 1), force_active={layer: np.ones((1, 1), bool) for layer in ROUTED}
            )


def _running_sum(folder: Path) -> Path:
    """A "decoder" whose cache holds the token ids and whose logit is their running sum."""
    cache, new_cache = ["batch", 1, "past", 1], ["batch", 1, "total", 1]
    parts = ("key", "value")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["tokens", "axes"], ["columns"]),
            *(
                helper.make_node("Concat", [f"past_key_values.0.{part}", "columns"], [f"present.0.{part}"], axis=2)
                for part in parts
            ),
            helper.make_node("ReduceSum", ["present.0.key", "total_axis"], ["sums"], keepdims=1),
            helper.make_node("Squeeze", ["sums", "head_axis"], ["logits"]),
        ],
        "sum",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            *(helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.FLOAT, cache) for part in parts),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 1]),
            *(helper.make_tensor_value_info(f"present.0.{part}", TensorProto.FLOAT, new_cache) for part in parts),
        ],
        [
            numpy_helper.from_array(np.array(axes), name)
            for name, axes in (("axes", [1, 3]), ("total_axis", [2]), ("head_axis", [1]))
        ],
    )
    path = folder / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_cache_outgrows_its_buffers_when_a_sequence_is_long(builds: Builds) -> None:
    ids = np.random.default_rng(0).integers(0, 97, (2, 420))
    positions = np.tile(np.arange(420), (2, 1))
    logits = {}
    # The first step leaves room for 256 + 2 tokens; the last buffers are made behind 300.
    for cuts in ((420,), (4, 5, 300, 301, 302, 420)):
        with OnnxRuntimeRunner(builds.released, threads=1) as runner:
            runner.reset(2)
            starts = (0, *cuts[:-1])
            steps = [
                runner.step(ids[:, a:b], _ones(2, b), positions[:, a:b]) for a, b in zip(starts, cuts, strict=True)
            ]
            logits[len(cuts)] = joined_logits(steps)
    np.testing.assert_allclose(logits[6], logits[1], atol=1e-4, rtol=0)
