"""Routed artefacts to open: tiny ones as checkpoints and adapters make them, and SmolLM2."""

import dataclasses

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

HIDDEN = 32


@pytest.fixture(scope="session")
def routed_artefact(tmp_path_factory):
    """A routed checkpoint as the DLO authors' code writes it."""
    root = tmp_path_factory.mktemp("routed")
    model = save_tiny_llama(
        root / "model", hidden=HIDDEN, vocab=BYTE_VOCABULARY + 1, tokenizer=True, routed=[True, False, True]
    )
    return exported(model, root / "artefact")


@pytest.fixture(scope="session")
def if_artefact(tmp_path_factory):
    """The same model, whole steps skipped."""
    return of_kind(tmp_path_factory, "llama_dlo_exattn", lowering="if")


@pytest.fixture(scope="session")
def attention_artefact(tmp_path_factory):
    """Tokens skip attention and leave their keys, so that the cache is a Llama's."""
    return of_kind(tmp_path_factory, "llama_dlo_attn")


@pytest.fixture(scope="session")
def attention_if_artefact(tmp_path_factory):
    """The same, whole steps skipped."""
    return of_kind(tmp_path_factory, "llama_dlo_attn", lowering="if")


@pytest.fixture(scope="session")
def last_logits_artefact(tmp_path_factory):
    """The head runs for the last token of each sequence alone."""
    return of_kind(tmp_path_factory, "llama_dlo_exattn", last_logits=True)


@pytest.fixture(scope="session")
def layer_artefact(tmp_path_factory):
    """Tokens skip whole layers: there is one more state, which a Llama has not."""
    return of_kind(tmp_path_factory, "llama_dlo")


@pytest.fixture(scope="session")
def active_artefact(tmp_path_factory):
    """Attention among the active tokens, likewise."""
    return of_kind(tmp_path_factory, "llama_dlo_attn", routing_kv="active")


def of_kind(tmp_path_factory, model_type, *, routing_kv=None, **options):
    root = tmp_path_factory.mktemp(model_type)
    model = save_tiny_llama(
        root / "model",
        hidden=HIDDEN,
        vocab=BYTE_VOCABULARY + 1,
        tokenizer=True,
        routed=[True, False, True],
        model_type=model_type,
        routing_kv=routing_kv,
    )
    return exported(model, root / "artefact", **options)


@pytest.fixture(scope="session")
def deepened_artefact(tmp_path_factory):
    """A plain checkpoint, deepened and routed by an adapter."""
    root = tmp_path_factory.mktemp("deepened")
    model = save_tiny_llama(root / "model", hidden=HIDDEN, vocab=BYTE_VOCABULARY + 1, tokenizer=True, tie=True)
    rng = np.random.default_rng(0)
    with open_checkpoint(str(model)) as checkpoint:
        plan = placements("tli", checkpoint.config.num_layers, every=1, init="zero_out")
        injection = expansion_adapter(checkpoint.tensors, plan)
        routers = {
            f"model.routers.{layer}.weight": ArrayTensor(rng.standard_normal((1, HIDDEN), dtype=np.float32))
            for layer in range(plan.num_layers)
        }
        adapter = dataclasses.replace(
            injection, is_dlo=(True,) * plan.num_layers, tensors={**injection.tensors, **routers}
        )
        save_adapter(adapter, root / "adapter")
    return exported(model, root / "artefact", adapter=root / "adapter")


@pytest.fixture(scope="session")
def smollm2_artefact(smollm2_gguf, smollm2_tli_adapter, tmp_path_factory):
    """SmolLM2-135M from GGUF, deepened from 30 to 36 layers, with calibrated routers."""
    return exported(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "artefact", adapter=smollm2_tli_adapter)


def exported(model, folder, **options):
    export_model(ExportRequest(str(model), folder, parity=False, **options), Reporter())
    return folder
