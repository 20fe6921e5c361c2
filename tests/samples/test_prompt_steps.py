"""C++ programs feed a prompt in the steps that `dlo run` feeds it in; for this, no TensorRT need be at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.runner import Runner, StepRequest, StepResult
from tests.documents import ROOT

INCLUDE = ROOT / "runtimes" / "cpp" / "include"


class FedRunner(Runner):
    """Remembers what it is fed."""

    def __init__(self, most: int) -> None:
        super().__init__("fed", num_layers=0, routed_layers=(), max_step=most)
        self.steps: list[str] = []

    def _empty_cache(self, batch: int) -> None:
        self.steps = []

    def _compute(self, request: StepRequest) -> StepResult:
        self.steps.append(f"{request.input_ids[0, 0]}:{request.sequence}")
        return StepResult(np.zeros((1, 1, 2), np.float32), {}, {})

    def _free(self) -> None:
        pass


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prints the steps that C++ makes of a prompt."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("there is no C++ compiler")
    built, source = tmp_path_factory.mktemp("steps") / "prompt_steps", Path(__file__).with_name("prompt_steps.cpp")
    options = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror", f"-I{INCLUDE}"]
    subprocess.run([compiler, *options, source, "-o", built], check=True)
    return built


@pytest.mark.parametrize(
    ("tokens", "most"),
    [(1, 1), (7, 1), (7, 3), (512, 512), (513, 512), (600, 512), (256, 256), (257, 256), (40, 300), (33, 32)],
)
def test_prompt_is_fed_in_the_steps_of_dlo_run_when_it_is_longer_than_the_largest_profile(
    program: Path, tokens: int, most: int
) -> None:
    with FedRunner(most) as runner:
        generate(runner, [list(range(tokens))], max_new_tokens=1)
        wanted = runner.steps
    assert sum(int(step.partition(":")[2]) for step in wanted) == tokens
    found = subprocess.run([program, str(tokens), str(most)], capture_output=True, text=True, check=True).stdout
    assert found.split() == wanted
