"""A model whose routed MLPs run in the dlo kernels is the model; who asks for them and cannot have them is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.model_kernels import BARS
from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.modeling.from_tensors import empty_llama_dlo
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.captured_cases import tiny_model, tokens_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("interpreted_model.py")), str(tmp_path_factory.mktemp("k"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    differences: dict[str, Any] = json.loads(result.stdout)
    return differences


@pytest.mark.parametrize(
    ("case", "bar"),
    [
        ("scaled, thresholds, padding, cache", 2e-6),
        ("forced", 2e-6),
        ("none", 2e-6),
        ("all", 2e-6),
        ("not scaled, biases of attention", 2e-6),
        ("torch.float16", 2**-7),  # of logits up to 4
        ("torch.bfloat16", 2**-4),
    ],
)
def test_model_equals_itself_when_its_mlps_run_in_interpreted_kernels(
    found: dict[str, Any], case: str, bar: float
) -> None:
    assert all(difference <= bar for difference in found[case])


def test_what_a_gpu_is_to_show_of_the_model_holds_when_interpreted(found: dict[str, Any]) -> None:
    assert found["as on a GPU"]["error"] <= BARS["float32"]
    assert found["as on a GPU"]["turned"] == 2


def test_generate_gives_the_same_tokens_and_asks_for_no_decision_when_mlps_run_in_kernels(
    found: dict[str, Any],
) -> None:
    assert found["tokens differ"] == 0


def test_weights_are_kept_once_and_train_and_save_as_before_when_kernels_have_read_them(found: dict[str, Any]) -> None:
    assert found["plain layers"]
    assert found["turned layers"] == [False, True, False]  # the one in the middle is not routed
    assert found["same weights"]
    assert found["same size"]
    assert found["gradients"] <= 1e-7
    assert found["saved"]
    assert found["shared with a step"]


def test_oracle_stays_in_plain_operators_when_kernels_are_asked_for(found: dict[str, Any]) -> None:
    assert found["masked"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("width", "layer 0: intermediate 60; expected a multiple of 8"),
        ("bias", "layer 0: mlp_bias true"),
        ("hook", "layer 2: up_proj of class Linear, or with hooks"),
        ("class", "layer 2: up_proj of class Sequential"),
        ("storage", "layer 0: gate_proj in storage that others share"),
        ("double", "layer 0: a stream of torch.float64"),
    ],
)
def test_layer_is_named_when_the_kernels_do_not_take_it_and_auto_runs_it_otherwise(
    found: dict[str, Any], case: str, words: str
) -> None:
    name, code, message, ran = found["refused"][case]
    assert (name, code, ran) == ("InputError", 2, True)
    assert words in message
    assert "hint:" in message


def test_kernels_are_refused_by_name_when_the_machine_the_routing_or_the_word_is_none_of_theirs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "mlp")
    with pytest.raises(MachineError, match=r"skip_kernels True: .*(the CPU, expected CUDA|Triton)[\s\S]*hint:"):
        model.skip_kernels = True
    for wanted in ("always", 1, None):
        with pytest.raises(InputError, match=r'skip_kernels: got .*[\s\S]*"auto", True or False'):
            model.skip_kernels = wanted  # type: ignore[assignment]  # what a user may write
    assert model.skip_kernels == "auto"
    whole = tiny_model(tmp_path / "layer", model_type="llama_dlo")
    with pytest.raises(InputError, match="routing is layer, expected mlp"):
        whole.skip_kernels = True


def test_auto_leaves_weights_as_they_are_when_the_model_is_on_a_cpu(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    model.generate(tokens_of(1, 4), max_new_tokens=1, do_sample=False)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_auto_asks_for_no_kernels_when_a_gradient_an_optimiser_or_a_compiler_would_mind(tmp_path: Path) -> None:
    model, device = tiny_model(tmp_path / "model").model, torch.device("cpu")
    assert model._kernels_for_step(device) is False  # gradients are recorded
    with torch.no_grad():
        assert model._kernels_for_step(device) == "auto"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model._kernels_for_step(device) is False
    model.train()
    model(input_ids=tokens_of(1, 4))
    model.eval()
    with torch.no_grad():
        assert model._kernels_for_step(device) is False  # turned weights would not lie as an optimiser's state does


def test_reference_stays_in_plain_operators_when_a_runner_or_tensors_make_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    assert model.skip_kernels == "auto"
    TorchRunner(model)
    assert model.skip_kernels is False
    names = tiny_model(tmp_path / "again").state_dict().keys()
    assert empty_llama_dlo(model.config.to_dict() | {"model_type": "llama_dlo_exattn"}, names).skip_kernels is False
