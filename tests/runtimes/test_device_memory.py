"""What a GPU's runner does with memory, on the CPU's: outputs kept there, and read back in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlo_export.checkpoints.dtypes import BFLOAT16, FLOAT32, FLOATS, ElementType
from dlo_export.runtimes.errors import BackendUnavailableError
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory
from dlo_export.runtimes.onnxruntime.machine_faults import check_machine
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.session import DecoderSession
from dlo_export.runtimes.runner import StepRequest
from tests.runtimes.feeding import feed, joined_logits, joined_scores, reference_samples
from tests.runtimes.graphs import Builds
from tests.runtimes.static_cache_graphs import decoder

KEPT = Provider(CPU.name, reads_back=True)


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int64)


@pytest.mark.parametrize("last_logits", [False, True])
def test_outputs_are_the_same_when_they_are_kept_and_read_back(
    builds: Builds, expected: np.lib.npyio.NpzFile, last_logits: bool
) -> None:
    samples = reference_samples(expected)
    found = {}
    for provider in (CPU, KEPT):
        with OnnxRuntimeRunner(builds.scored, weights_folder=builds.folder, threads=1, provider=provider) as runner:
            results, _ = feed(runner, samples, 3, last_logits=last_logits)
            # Buffers are used again: results must not change with them.
            feed(runner, samples[1:], 2)
        found[provider.reads_back] = results
    assert len(found[True][0].logits[0]) == (1 if last_logits else found[False][0].logits.shape[1])
    np.testing.assert_array_equal(joined_logits(found[True]), joined_logits(found[False]))
    for layer, scores in joined_scores(found[False]).items():
        np.testing.assert_array_equal(joined_scores(found[True])[layer], scores)


@pytest.mark.parametrize("provider", [CPU, KEPT], ids=["of the host", "read back"])
def test_onnxruntime_is_asked_for_outputs_when_it_allocates_them_and_only_then(provider: Provider) -> None:
    session = DecoderSession(decoder("static", scores=True), "model", "static", {"provider": provider})
    ids = _ones(2, 3)
    request, binding, outputs = StepRequest(ids, ids, ids), session.binding(), session.step_outputs()
    feeds = {"input_ids": ids, "position_ids": ids, "write_indices": np.zeros(2, np.int64), "kv_lengths": 3 * _ones(2)}
    cache = {key: np.zeros(shape, np.float32) for key, shape in session.interface.state_shapes(2).items()}
    for name, array in (feeds | cache).items():
        binding.bind_cpu_input(name, array)
    outputs.bind(binding, request)
    for name in session.interface.present_of.values():
        binding.bind_output(name)
    session.run(binding)
    asked = []

    def objects() -> Sequence[ort.OrtValue]:
        asked.append(binding.get_outputs())
        return asked[-1]

    found = outputs.read(request, objects)
    assert len(asked) == (0 if provider.reads_back else 1)
    assert list(found) == ["logits", "router_scores.0", "router_scores.1"]
    for value, bound in zip(found.values(), binding.get_outputs(), strict=False):
        np.testing.assert_array_equal(value, bound.numpy())


def test_branches_continue_alike_when_a_kept_cache_is_forked(builds: Builds) -> None:
    ids = np.random.default_rng(0).integers(0, 97, (1, 6))
    with OnnxRuntimeRunner(builds.released, threads=1, provider=KEPT) as runner:
        runner.reset(1)
        runner.step(ids[:, :5], _ones(1, 5), np.arange(5)[np.newaxis])
        runner.fork(3)
        forked = runner.step(np.tile(ids[:, 5:], (3, 1)), _ones(3, 6), np.full((3, 1), 5)).logits
    with OnnxRuntimeRunner(builds.released, threads=1) as runner:
        runner.reset(1)
        whole = runner.step(ids, _ones(1, 6), np.arange(6)[np.newaxis]).logits[:, -1:]
    np.testing.assert_allclose(forked, np.tile(whole, (3, 1, 1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_runner_runs_every_float_when_numpy_has_no_word_for_it(tmp_path: Path, kind: ElementType) -> None:
    with OnnxRuntimeRunner(_running_sum(tmp_path, kind), threads=1, provider=KEPT) as runner:
        runner.reset(2)
        runner.step(np.array([[3, 4], [5, 6]]), _ones(2, 2), _ones(2, 2))
        result = runner.step(np.array([[5], [7]]), _ones(2, 3), _ones(2, 1))
    assert result.logits.dtype == np.float32
    np.testing.assert_array_equal(result.logits[:, -1, 0], [12, 18])


def test_memory_gives_a_part_when_it_is_asked_for_one() -> None:
    session = ort.InferenceSession(_identity(), providers=[CPU.name])
    memory = DeviceMemory(session, CPU)
    numbers = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4)
    memory.write(numbers)
    part = memory.read(BFLOAT16, (2, 2), 6)
    np.testing.assert_array_equal(part.astype(np.float32), [[6, 7], [8, 9]])
    memory.write(np.zeros((3, 4), ml_dtypes.bfloat16))
    assert float(part[0, 0]) == 6


def test_memory_gives_what_it_holds_now_when_it_is_read_again() -> None:
    memory = DeviceMemory(ort.InferenceSession(_identity(), providers=[CPU.name]), CPU)
    memory.overwrite(np.arange(4, dtype=np.float32))
    before = memory.read(FLOAT32, (1, 4))
    memory.overwrite(np.arange(4, 8, dtype=np.float32))
    np.testing.assert_array_equal(memory.read(FLOAT32, (1, 4)), [[4, 5, 6, 7]])
    np.testing.assert_array_equal(memory.read(FLOAT32, (2, 1), 2), [[6], [7]])
    memory.reserve(1 << 20)  # elsewhere
    memory.overwrite(np.full(1 << 18, 8, np.float32))
    np.testing.assert_array_equal(memory.read(FLOAT32, (2, 1), 2), [[8], [8]])
    np.testing.assert_array_equal(before, [[0, 1, 2, 3]])


def test_memory_is_refused_when_there_is_not_so_much() -> None:
    memory = DeviceMemory(ort.InferenceSession(_identity(), providers=[CPU.name]), CPU)
    with pytest.raises(BackendUnavailableError, match=f"{2**60} bytes on cpu: ONNX Runtime found no memory left"):
        memory.reserve(2**60)


def test_memory_holds_nothing_when_there_was_not_so_much() -> None:
    memory = DeviceMemory(ort.InferenceSession(_identity(), providers=[CPU.name]), CPU)
    memory.reserve(64)
    with pytest.raises(BackendUnavailableError):
        memory.reserve(2**60)
    assert memory.bytes == 0, "whoever asks how much there is would write to what was given back"
    memory.reserve(64)
    assert memory.bytes == 64


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("[E] bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1048576", "no memory left"),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; file=cuda_allocator.cc", "no memory left"),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1", "insufficient"),
        ("CUDA failure 209: no kernel image is available for execution on the device ; GPU=0", "no kernel image"),
        ("CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; GPU=0", "CUBLAS_STATUS_NOT_INITIALIZED"),
    ],
)
def test_fault_is_the_machines_when_onnxruntime_says_so(said: str, shown: str) -> None:
    with pytest.raises(BackendUnavailableError, match=shown) as refused:
        check_machine("model", RuntimeError(said))
    assert refused.value.exit_code == 4
    assert refused.value.hint


def test_fault_is_not_the_machines_when_a_model_is_wrong() -> None:
    check_machine("model", RuntimeError("[ONNXRuntimeError] : 6 : indices element out of data bounds"))


def _identity() -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def _running_sum(folder: Path, kind: ElementType) -> Path:
    """A "decoder" whose cache holds the token ids and whose logits are their sum, in a type's own numbers."""
    cache, new_cache = ["batch", 1, "past", 1], ["batch", 1, "total", 1]
    number, parts = kind.onnx_number, ("key", "value")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["tokens"], to=number),
            helper.make_node("Unsqueeze", ["tokens", "axes"], ["columns"]),
            *(
                helper.make_node("Concat", [f"past_key_values.0.{part}", "columns"], [f"present.0.{part}"], axis=2)
                for part in parts
            ),
            # The CPU adds in float32 alone; reading the cache in its own type is what is of interest.
            helper.make_node("Cast", ["present.0.key"], ["precise"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["precise", "axis_of_tokens"], ["sums"], keepdims=1),
            helper.make_node("Squeeze", ["sums", "axis_of_heads"], ["total"]),
            helper.make_node("Shape", ["input_ids"], ["step"]),
            helper.make_node("Concat", ["step", "one"], ["shape"], axis=0),
            helper.make_node("Expand", ["total", "shape"], ["expanded"]),
            helper.make_node("Cast", ["expanded"], ["logits"], to=number),
        ],
        "sum",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            *(helper.make_tensor_value_info(f"past_key_values.0.{part}", number, cache) for part in parts),
        ],
        [
            helper.make_tensor_value_info("logits", number, ["batch", "sequence", 1]),
            *(helper.make_tensor_value_info(f"present.0.{part}", number, new_cache) for part in parts),
        ],
        [
            numpy_helper.from_array(np.array(axes), name)
            for name, axes in (("axes", [1, 3]), ("axis_of_tokens", [2]), ("axis_of_heads", [1]), ("one", [1]))
        ],
    )
    path = folder / "sum.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path
