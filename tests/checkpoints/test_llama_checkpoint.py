"""What a checkpoint says of its weights as a whole: its hash, and what does not fit its configuration."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.opening import open_checkpoint
from tests.checkpoints.rewriting import WEIGHTS, rewrite_json, rewrite_tensors
from tests.tiny_models import save_tiny_llama

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "tiny")


def test_sha256_is_that_of_the_file_when_there_is_one(folder: Path) -> None:
    assert open_checkpoint(folder).sha256() == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def test_sha256_is_that_of_the_listing_when_there_are_shards(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, shards=3)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 3
    listing = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shards)
    assert open_checkpoint(folder).sha256() == hashlib.sha256(listing.encode()).hexdigest()


def test_every_tensor_is_named_when_several_are_wrong(folder: Path) -> None:
    rewrite_tensors(
        folder,
        {
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.3.mlp.up_proj.weight": torch.zeros(56, 32),
            "model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 32),
            NORM: torch.zeros(32, dtype=torch.int32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        f"{folder}: 4 tensors are not what config.json describes",
        "model.layers.1.mlp.up_proj.weight: missing, expected [56, 32]",
        "model.layers.0.self_attn.k_proj.weight: is [32, 32] in model.safetensors, expected [16, 32]",
        "model.layers.3.mlp.up_proj.weight: [56, 32] in model.safetensors has no place in this model",
        "model.norm.weight: is int32 in model.safetensors, expected float32, float16, bfloat16",
        "",
        "hint: config.json belongs to another model, or the checkpoint is incomplete",
    ]


def test_the_list_of_tensors_is_cut_when_nothing_fits(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, layers=8)
    rewrite_json(folder / "config.json", hidden_size=40)
    with pytest.raises(CheckpointError, match=r"75 tensors are not(.*\n)+.*and 25 more\n\nhint: "):
        open_checkpoint(folder)


def test_router_is_named_when_it_is_missing(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, routed=[True, False, True])
    rewrite_tensors(folder, {"model.routers.2.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.routers\.2\.weight: missing, expected \[1, 32\]"):
        open_checkpoint(folder)


def test_redundant_tensors_are_left_out_when_old_conversions_saved_them(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, tie=True)
    embeddings = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite_tensors(folder, {"lm_head.weight": embeddings.clone(), buffer: torch.ones(4, dtype=torch.float64)})
    assert {"lm_head.weight", buffer}.isdisjoint(open_checkpoint(folder).tensors)


def test_tied_head_is_refused_when_its_copy_differs(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, tie=True)
    embeddings = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    rewrite_tensors(folder, {"lm_head.weight": embeddings + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        open_checkpoint(folder)
