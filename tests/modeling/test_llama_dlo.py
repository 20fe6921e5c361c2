import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import dlo_export.modeling.llama_dlo
from dlo_export.checkpoints.model_types import MODEL_TYPES, ROUTED_BLOCKS, RoutingKind, routed_type
from dlo_export.modeling.configuration import LlamaDloConfig, RoutingConfigError
from dlo_export.modeling.decoder_layer import ROUTED_LAYERS
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM, model_class_of
from dlo_export.modeling.untrained_routers import UntrainedRoutersWarning
from tests.modeling.tiny_routed import TINY, decisions, padded, tiny_model

DATA = Path(__file__).parents[1] / "data"
REFERENCE = DATA / "reference_mlp_routed"


@pytest.fixture(params=["mlp", "layer"], scope="module")
def authors(request: pytest.FixtureRequest) -> Path:
    """A checkpoint of the DLO authors' own code, and what that code computes with it."""
    return DATA / f"reference_{request.param}_routed"


@pytest.fixture
def expected(authors: Path) -> dict[str, np.ndarray]:
    with np.load(authors / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(params=["skipping", "masked"])
def reference(authors: Path, request: pytest.FixtureRequest) -> LlamaDloForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(authors).eval()
    model.masked = request.param == "masked"
    return model


@torch.no_grad()
def test_model_equals_the_authors_when_a_sample_runs_alone(
    reference: LlamaDloForCausalLM, expected: dict[str, np.ndarray]
) -> None:
    for sample in range(3):
        output = reference(torch.from_numpy(expected[f"ids_{sample}"]))
        np.testing.assert_allclose(output.logits, expected[f"logits_{sample}"], atol=1e-5)
        np.testing.assert_array_equal(decisions(output.router_scores), expected[f"active_{sample}"])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5])
def test_model_equals_the_authors_when_decoding_with_a_cache(
    reference: LlamaDloForCausalLM, expected: dict[str, np.ndarray], chunk: int
) -> None:
    for sample in range(3):
        cache, start = None, 0
        for tokens in torch.from_numpy(expected[f"ids_{sample}"]).split(chunk, dim=1):
            output = reference(tokens, past_key_values=cache, use_cache=True)
            cache, stop = output.past_key_values, start + tokens.shape[1]
            np.testing.assert_allclose(output.logits, expected[f"logits_{sample}"][:, start:stop], atol=1e-5)
            np.testing.assert_array_equal(
                decisions(output.router_scores), expected[f"active_{sample}"][..., start:stop]
            )
            start = stop


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_model_equals_the_authors_when_the_batch_is_left_padded(
    reference: LlamaDloForCausalLM, expected: dict[str, np.ndarray], cached: bool
) -> None:
    samples = [torch.from_numpy(expected[f"ids_{sample}"][0]) for sample in range(3)]
    ids, mask, positions = padded(samples)
    width = ids.shape[1]
    split = width - 4 if cached else width
    first = reference(ids[:, :split], attention_mask=mask[:, :split], position_ids=positions[:, :split], use_cache=True)
    logits, active = [first.logits], [decisions(first.router_scores)]
    for index in range(split, width):
        output = reference(
            ids[:, index : index + 1],
            attention_mask=mask[:, : index + 1],
            position_ids=positions[:, index : index + 1],
            past_key_values=first.past_key_values,
        )
        logits.append(output.logits)
        active.append(decisions(output.router_scores))
    all_logits, all_active = torch.cat(logits, dim=1), np.concatenate(active, axis=-1)
    assert all_logits.isfinite().all()
    for sample, length in enumerate(map(len, samples)):
        np.testing.assert_allclose(all_logits[sample, -length:], expected[f"logits_{sample}"][0], atol=1e-5)
        np.testing.assert_array_equal(all_active[:, sample, -length:], expected[f"active_{sample}"][:, 0])


@torch.no_grad()
@pytest.mark.parametrize("forced", ["nothing", "everything", "mixed"])
@pytest.mark.parametrize("routing", ROUTED_LAYERS)
def test_skipping_equals_the_masked_form_when_decisions_are_forced(routing: RoutingKind, forced: str) -> None:
    model = tiny_model(routing, rescale_hidden_states=True, scale_factor=1.5, scale_gap=0.4)
    ids = torch.arange(14).reshape(2, 7)
    choices = {
        "nothing": torch.zeros(2, 7),
        "everything": torch.ones(2, 7),
        "mixed": torch.arange(14).reshape(2, 7) % 3,
    }
    force = dict.fromkeys(range(3), choices[forced] == 1)
    skipping = model(ids, force_active=force)
    model.masked = True
    masked = model(ids, force_active=force)
    np.testing.assert_allclose(skipping.logits, masked.logits, atol=1e-6)
    for layer in range(3):
        np.testing.assert_allclose(skipping.router_scores[layer], masked.router_scores[layer], atol=1e-6)


@torch.no_grad()
def test_mlp_gets_only_active_tokens_when_skipping() -> None:
    model = tiny_model()
    rows = []
    model.model.layers[1].mlp.register_forward_hook(lambda _module, args, _output: rows.append(args[0].numel() // 24))
    force = torch.zeros(2, 5, dtype=torch.bool)
    model(torch.arange(10).reshape(2, 5), force_active={1: force})
    assert rows == []
    force[1, 2] = force[0, 4] = True
    model(torch.arange(10).reshape(2, 5), force_active={1: force})
    assert rows == [2]


@pytest.mark.parametrize("routing", ROUTED_LAYERS)
def test_model_learns_through_the_routed_branch_when_trained(routing: RoutingKind) -> None:
    model = tiny_model(routing, rescale_hidden_states=True, scale_factor=2.0, scale_gap=0.5)
    ids = torch.arange(10).reshape(2, 5)
    loss = model(ids, labels=ids).loss
    loss.backward()
    for router in model.model.routers.values():
        assert router.weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("routing", ROUTED_LAYERS)
def test_generate_agrees_with_full_recompute_when_batch_is_left_padded(routing: RoutingKind) -> None:
    model = tiny_model(routing, eos_token_id=None)
    ids = torch.tensor([[0, 0, 5, 9, 2], [4, 8, 15, 16, 23]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, start in ((0, 2), (1, 0)):
        tokens = ids[row : row + 1, start:]
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert generated[row, start:].tolist() == tokens[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("routing", ROUTED_LAYERS)
def test_model_equals_llama_when_nothing_is_routed(routing: RoutingKind) -> None:
    model = tiny_model(routing, is_dlo=False, tie_word_embeddings=True)
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(12).reshape(2, 6)
    np.testing.assert_allclose(model(ids).logits, plain(ids).logits, atol=1e-6)
    assert not [name for name, _ in model.named_parameters() if "routers" in name]


@torch.no_grad()
def test_checkpoint_round_trips_when_saved(authors: Path, tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    AutoModelForCausalLM.from_pretrained(authors).save_pretrained(tmp_path)
    stored, original = load_file(tmp_path / "model.safetensors"), load_file(authors / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    config, written = AutoConfig.from_pretrained(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert isinstance(config, LlamaDloConfig)
    assert written["architectures"] == [MODEL_TYPES[written["model_type"]].architecture]
    assert config.is_dlo == json.loads((authors / "config.json").read_text())["is_dlo"]
    assert "routing" not in written
    assert (config.rescale_hidden_states, config.scale_factor, config.scale_gap) == (True, 2.0, 0.05)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.from_numpy(expected["ids_0"])).logits
    np.testing.assert_allclose(logits, expected["logits_0"], atol=1e-5)


def test_routers_stay_fp32_when_the_model_is_opened_in_bf16() -> None:
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.model.routers.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2, 3]])).router_scores[0].dtype == torch.float32


def test_from_pretrained_warns_when_routers_are_all_zeros(tmp_path: Path) -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.model.routers["1"].weight)
    model.save_pretrained(tmp_path)
    with pytest.warns(UntrainedRoutersWarning, match=r"layers \[1\] are all zeros.*\n\nhint: fit them with `dlo calib"):
        LlamaDloForCausalLM.from_pretrained(tmp_path)


def test_from_pretrained_does_not_warn_when_the_zero_router_is_an_identity_layers(tmp_path: Path) -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.model.routers["1"].weight)
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedRoutersWarning)
        LlamaDloForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_dlo": [True, False]}, r"is_dlo has 2 entries, expected num_hidden_layers \(3\)"),
        ({"is_dlo": True, "rescale_hidden_states": True, "scale_factor": 2.0}, "scale_gap is missing"),
    ],
)
def test_config_raises_when_routing_keys_contradict(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RoutingConfigError, match=message):
        LlamaDloConfig(**{**TINY, **changes})


def test_config_switches_the_cache_on_when_training_saved_it_off() -> None:
    assert LlamaDloConfig(**TINY, use_cache=False).use_cache


def test_model_raises_when_an_unrouted_layer_is_forced() -> None:
    with pytest.raises(ValueError, match=r"force_active names layers \[1\], which are not routed"):
        tiny_model(is_dlo=[True, False, True])(torch.tensor([[1]]), force_active={1: torch.tensor([[True]])})


def test_importing_the_module_is_what_registers_the_model() -> None:
    assert dlo_export.modeling.llama_dlo.LlamaDloForCausalLM is LlamaDloForCausalLM
    assert [layer.__name__ for layer in ROUTED_LAYERS.values()] == LlamaDloForCausalLM._no_split_modules
    for routing in ROUTED_LAYERS:
        model = model_class_of(routed_type(routing))
        assert AutoModelForCausalLM._model_mapping[model.config_class] is model
        assert (tiny_model(routing).config.routing, model.__name__) == (routing, routed_type(routing).architecture)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routing", ROUTED_LAYERS)
def test_routing_stays_in_fp32_when_autocast_is_on(routing: RoutingKind, masked: bool) -> None:
    model = tiny_model(routing, rescale_hidden_states=True, scale_factor=2.0, scale_gap=0.5)
    model.masked = masked
    ids = torch.arange(14).reshape(2, 7)
    exact = model(ids).router_scores[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    # The first router sees the embeddings, which autocast leaves alone.
    assert torch.equal(output.router_scores[0], exact)
    assert {scores.dtype for scores in output.router_scores.values()} == {torch.float32}
    output.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("routing", "ends", "runs_wanted"),
    [
        ("mlp", "mlp.down_proj", 1),
        ("layer", "mlp.down_proj", 2),
        ("attention", "self_attn.o_proj", 1),
        ("attention-active", "self_attn.o_proj", 2),
    ],
)
def test_training_step_equals_the_masked_form_when_the_same_tokens_are_selected(
    routing: RoutingKind, ends: str, runs_wanted: int, checkpointing: bool
) -> None:
    model = tiny_model(routing, rescale_hidden_states=True, scale_factor=2.0, scale_gap=0.5)
    ids = torch.arange(14).reshape(2, 7)
    active = torch.arange(14).reshape(2, 7) % 3 > 0
    forced = model(ids, force_active=dict.fromkeys(range(3), active))
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    runs = []
    last = model.model.layers[1].get_submodule(ends)
    last.register_forward_hook(lambda _module, args, _output: runs.append(args[0].shape))
    output = model(ids, labels=ids, use_cache=False, select_tokens=dict.fromkeys(range(3), lambda _scores: active))
    assert len(runs) == runs_wanted, "where skipped tokens are hidden, labels need a run of their own"
    np.testing.assert_allclose(output.logits.detach(), forced.logits.detach(), atol=1e-5)
    assert all(torch.equal(routing.active, active) for routing in output.training_routing.values())
    assert all((routing.similarity.abs() <= 1 + 1e-6).all() for routing in output.training_routing.values())
    output.loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.model.routers.values())


@pytest.mark.parametrize("routing", ROUTED_LAYERS)
def test_router_learns_from_skipped_tokens_when_nothing_is_active(routing: RoutingKind) -> None:
    model = tiny_model(routing)
    ids = torch.arange(14).reshape(2, 7)
    none = torch.zeros(2, 7, dtype=torch.bool)
    model(ids, labels=ids, select_tokens=dict.fromkeys(range(3), lambda _scores: none)).loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.model.routers.values())
    skipped = "mlp.up_proj" if ROUTED_BLOCKS[routing][-1] == "mlp" else "self_attn.q_proj"
    assert not model.model.layers[0].get_submodule(skipped).weight.grad.any()
