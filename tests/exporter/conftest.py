"""SmolLM2-135M deepened and routed, as an adapter."""

import dataclasses
from pathlib import Path

import pytest

from dlo_export.checkpoints.adapter.adapter import load_adapter, save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.opening import open_checkpoint

ROUTERS = Path(__file__).parents[1] / "data" / "smollm2_routers"


@pytest.fixture(scope="session")
def smollm2_tli_adapter(smollm2_gguf, tmp_path_factory):
    """TLI every five layers; routers on the original layers that calibration routed."""
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
