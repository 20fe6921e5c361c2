"""What a session refuses before a decoder runs in it."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from dlo_export.runtimes.errors import BackendUnavailableError, ModelInterfaceError, ModelLoadError, StepError
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.session import DecoderSession
from tests.runtimes.graphs import Builds


def test_session_runs_on_what_was_asked_for_when_it_is_there(builds: Builds) -> None:
    session = DecoderSession(builds.released, "model", "growing", {"provider": CPU, "threads": 1})
    assert session.provider == CPU
    assert session.interface.num_layers == 4


def test_session_plans_no_memory_for_shapes_when_its_cache_grows(builds: Builds) -> None:
    options = ort.SessionOptions()
    assert options.enable_mem_pattern
    DecoderSession(builds.released, "model", "growing", {"options": options, "threads": 1})
    assert not options.enable_mem_pattern


@pytest.mark.parametrize("name", ["CUDAExecutionProvider", "NoSuchProvider"])
def test_session_is_refused_when_the_provider_is_not_available(builds: Builds, name: str) -> None:
    assert name not in ort.get_available_providers()
    with pytest.raises(BackendUnavailableError, match=rf"has no {name} here[\s\S]*hint: .*onnxruntime-gpu") as refused:
        OnnxRuntimeRunner(builds.released, provider=Provider(name, {"device_id": "0"}))
    assert refused.value.exit_code == 4


def test_session_is_refused_when_the_provider_does_not_know_an_option(builds: Builds) -> None:
    with pytest.raises(ModelLoadError, match="no_such_option"):
        OnnxRuntimeRunner(builds.released, provider=Provider(CPU.name, {"no_such_option": "1"}))


def test_session_is_refused_when_the_cache_is_of_another_kind(builds: Builds) -> None:
    with pytest.raises(ModelInterfaceError, match=r"is not a decoder with a static KV cache: .*'kv_lengths'"):
        DecoderSession(builds.released, "model", "static", {})


def test_session_says_nothing_beside_its_error_when_a_kernel_fails(
    builds: Builds, capfd: pytest.CaptureFixture[str]
) -> None:
    with OnnxRuntimeRunner(builds.released) as runner:
        runner.reset(1)
        with pytest.raises(StepError, match="out of data bounds"):
            runner.step(np.array([[10**6]]), np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64))
    assert capfd.readouterr().err == ""
