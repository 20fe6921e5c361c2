"""Attention skipped, alone or with all of its layer, with a KV cache: what only these kinds of routing have."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.modeling.active_cache import ActiveLayerCache, CacheError, active_tokens_of
from dlo_export.modeling.configuration import RoutingConfigError
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.routing import SelectTokens
from dlo_export.modeling.untrained_routers import UntrainedRoutersWarning, warn_of_untrained_routers
from tests.modeling.tiny_routed import decisions, padded, tiny_model

ROUTED = [True, False, True]
SCALED = {"rescale_hidden_states": True, "scale_factor": 1.5, "scale_gap": 0.4}
# Weights with which attention matters: at the default of 0.02 it hardly does.
LARGE = {"initializer_range": 0.2}
IDS = torch.arange(22).reshape(2, 11) * 7 % 60
MIXED = {0: torch.arange(22).reshape(2, 11) % 3 > 0, 2: torch.arange(22).reshape(2, 11) % 4 == 1}


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> LlamaDloForCausalLM:
    """Deep enough that a wrong cache of one layer shows in the decisions of another."""
    return tiny_model("layer", is_dlo=ROUTED, attn_implementation=request.param, eos_token_id=None, **LARGE, **SCALED)


def everywhere(model: LlamaDloForCausalLM, select: SelectTokens) -> dict[int, SelectTokens]:
    """The same selection in each routed layer."""
    return dict.fromkeys(model.config.routed_layers, select)


def chunks(ids: torch.Tensor, *sizes: int) -> Iterator[tuple[slice, torch.Tensor]]:
    start = 0
    for chunk in ids.split(sizes, dim=1):
        yield slice(start, start + chunk.shape[1]), chunk
        start += chunk.shape[1]


def fed(model: LlamaDloForCausalLM, *sizes: int, cache: DynamicCache | None = None) -> DynamicCache:
    """The cache after feeding the first tokens in chunks."""
    cache = cache or DynamicCache()
    for _, chunk in chunks(IDS[:, : sum(sizes)], *sizes):
        model(chunk, past_key_values=cache)
    return cache


def rest(model: LlamaDloForCausalLM, cache: DynamicCache, start: int, rows: list[int] | None = None) -> torch.Tensor:
    """Logits of the tokens behind the cache."""
    ids = IDS if rows is None else IDS[rows]
    return model(ids[:, start:], past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("forced", ["nothing", "everything", "mixed", "routers"])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_steps_equal_full_recompute(model: LlamaDloForCausalLM, forced: str, masked: bool) -> None:
    force = {
        "nothing": {layer: torch.zeros_like(active) for layer, active in MIXED.items()},
        "everything": {layer: torch.ones_like(active) for layer, active in MIXED.items()},
        "mixed": MIXED,
        "routers": {},
    }[forced]
    model.masked = masked
    full = model(IDS, force_active=force, use_cache=False)
    cache = DynamicCache()
    for span, chunk in chunks(IDS, 1, 4, 1, 1, 3, 1):
        step = model(chunk, past_key_values=cache, force_active={i: active[:, span] for i, active in force.items()})
        np.testing.assert_allclose(step.logits, full.logits[:, span], atol=1e-5)
        for layer, scores in step.router_scores.items():
            np.testing.assert_allclose(scores, full.router_scores[layer][:, span], atol=1e-6)
    for layer in (0, 2):
        wanted = force.get(layer, full.router_scores[layer] > 0.5)
        assert torch.equal(active_tokens_of(cache, layer), wanted)
        assert not cache.layers[layer].keys.transpose(1, 2)[~wanted].any()
        assert not cache.layers[layer].values.transpose(1, 2)[~wanted].any()
    assert [type(layer) is ActiveLayerCache for layer in cache.layers] == ROUTED


@torch.no_grad()
def test_model_equals_a_llama_when_every_token_is_active(model: LlamaDloForCausalLM) -> None:
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "routers" not in name})
    model.config.rescale_hidden_states = False
    force = {layer: torch.ones_like(active) for layer, active in MIXED.items()}
    np.testing.assert_allclose(model(IDS, force_active=force).logits, plain(IDS).logits, atol=1e-5)


@torch.no_grad()
def test_a_skipped_token_changes_nobody_else() -> None:
    # Of one layer, the others' outputs are those of a sequence without it, at their own positions.
    single = tiny_model("layer", num_hidden_layers=1, is_dlo=[True], **LARGE)
    active = torch.tensor([[True, False, True, True, False, True]])
    ids = torch.tensor([[5, 9, 2, 44, 31, 8]])
    logits = single(ids, force_active={0: active}).logits
    positions = active[0].nonzero().reshape(1, -1)
    alone = single(ids[active][None], position_ids=positions, force_active={0: torch.ones(1, 4, dtype=torch.bool)})
    np.testing.assert_allclose(logits[active][None], alone.logits, atol=1e-5)
    embedded = single.model.norm(single.model.embed_tokens(ids))
    np.testing.assert_allclose(logits[~active], single.lm_head(embedded)[~active], atol=1e-6)


@torch.no_grad()
def test_only_active_tokens_are_computed_when_skipping() -> None:
    model = tiny_model("layer")
    layer, rows = model.model.layers[1], {}

    def counted(name: str) -> Callable[..., None]:
        return lambda _module, args, _output: rows.setdefault(name, []).append(args[0].numel() // 24)

    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp"):
        layer.get_submodule(name).register_forward_hook(counted(name))
    force = torch.zeros(2, 11, dtype=torch.bool)
    model(IDS, force_active={1: force})
    assert rows == {"self_attn.q_proj": [0], "self_attn.k_proj": [0], "self_attn.v_proj": [0]}
    rows.clear()
    force[0, 3] = force[1, 9] = force[1, 10] = True
    model(IDS, force_active={1: force})
    assert set(map(tuple, rows.values())) == {(3,)}
    assert len(rows) == 5


# What may happen to a cache between steps.


@torch.no_grad()
def test_a_cropped_cache_equals_one_that_was_never_longer(model: LlamaDloForCausalLM) -> None:
    cache = fed(model, 4, 3, 1)
    cache.crop(-3)
    assert active_tokens_of(cache, 0).shape == (2, 5)
    np.testing.assert_allclose(rest(model, cache, 5), model(IDS, use_cache=False).logits[:, 5:], atol=1e-5)


@torch.no_grad()
def test_a_cache_follows_its_sequences_when_they_are_reordered_repeated_or_dropped(model: LlamaDloForCausalLM) -> None:
    wanted = model(IDS, use_cache=False).logits[:, 6:]
    cache = fed(model, 6)
    cache.reorder_cache(torch.tensor([1, 0]))
    np.testing.assert_allclose(rest(model, cache, 6, [1, 0]), wanted[[1, 0]], atol=1e-5)
    cache = fed(model, 6)
    cache.batch_repeat_interleave(2)
    np.testing.assert_allclose(rest(model, cache, 6, [0, 0, 1, 1]), wanted[[0, 0, 1, 1]], atol=1e-5)
    cache = fed(model, 6)
    cache.batch_select_indices(torch.tensor([1]))
    np.testing.assert_allclose(rest(model, cache, 6, [1]), wanted[[1]], atol=1e-5)


@torch.no_grad()
def test_a_cache_is_as_new_when_it_was_reset(model: LlamaDloForCausalLM) -> None:
    cache = fed(model, 6)
    cache.reset()
    assert cache.get_seq_length() == 0
    fed(model, 2, 4, cache=cache)
    np.testing.assert_allclose(rest(model, cache, 6), model(IDS, use_cache=False).logits[:, 6:], atol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing_when_steps_are_cached(model: LlamaDloForCausalLM) -> None:
    samples = [IDS[0, :9], IDS[1, :4]]
    ids, mask, positions = padded(samples)
    cache, logits, active = DynamicCache(), [], []
    for span, chunk in chunks(ids, 6, 1, 2):
        step = model(chunk, attention_mask=mask[:, : span.stop], position_ids=positions[:, span], past_key_values=cache)
        logits.append(step.logits)
        active.append(decisions(step.router_scores))
    for row, sample in enumerate(samples):
        alone = model(sample[None], use_cache=False)
        np.testing.assert_allclose(torch.cat(logits, 1)[row, -len(sample) :], alone.logits[0], atol=1e-5)
        found = np.concatenate(active, axis=-1)[:, row, -len(sample) :]
        np.testing.assert_array_equal(found, decisions(alone.router_scores)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True}],
    ids=["greedy", "beams", "several beams", "sampling"],
)
def test_generate_is_the_same_with_and_without_a_cache(model: LlamaDloForCausalLM, options: dict[str, object]) -> None:
    ids, mask, _ = padded([IDS[0, :7], IDS[1, :4]])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        arguments = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False, **options}
        found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **arguments))
    assert torch.equal(*found)


@torch.no_grad()
def test_generate_takes_guesses_back_when_they_were_wrong(model: LlamaDloForCausalLM) -> None:
    ids = torch.tensor([[4, 8, 15, 4, 8, 23, 4, 8]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **arguments), wanted)


@torch.no_grad()
def test_caches_that_cannot_remember_are_refused_by_name(model: LlamaDloForCausalLM) -> None:
    with pytest.raises(CacheError, match=r"found a StaticCache.*needs a DynamicCache"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(CacheError, match="found a StaticCache"):
        model.generate(IDS, cache_implementation="static", max_new_tokens=2, pad_token_id=0)
    others = DynamicCache()
    tiny_model("mlp")(IDS, past_key_values=others)
    with pytest.raises(CacheError, match="layer 0 holds 11 tokens and does not say which of them were active"):
        model(IDS, past_key_values=others)


def test_a_zero_router_is_told_of_unless_all_that_is_skipped_adds_nothing() -> None:
    model = tiny_model("layer")
    layer = model.model.layers[1]
    for weight in (model.model.routers["1"].weight, layer.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    with pytest.warns(
        UntrainedRoutersWarning, match=r"layers \[1\] are all zeros.*so they are skipped for every token"
    ):
        warn_of_untrained_routers(model)
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedRoutersWarning)
        warn_of_untrained_routers(model)


# Attention alone.


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routing", ["attention", "attention-active"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_cached_steps_equal_full_recompute_when_attention_is_skipped(
    routing: RoutingKind, kernel: str, masked: bool
) -> None:
    model = tiny_model(routing, is_dlo=ROUTED, attn_implementation=kernel, **LARGE, **SCALED)
    model.masked = masked
    for force in (MIXED, {}):
        full = model(IDS, force_active=force, use_cache=False)
        cache = DynamicCache()
        for span, chunk in chunks(IDS, 1, 4, 1, 1, 3, 1):
            step = model(chunk, past_key_values=cache, force_active={i: a[:, span] for i, a in force.items()})
            np.testing.assert_allclose(step.logits, full.logits[:, span], atol=1e-5)
        assert {type(layer) is ActiveLayerCache for layer in cache.layers} == (
            {False} if routing == "attention" else {True, False}
        )


@torch.no_grad()
@pytest.mark.parametrize("routing", ["attention", "attention-active"])
def test_layer_is_llamas_with_its_attention_scaled_or_left_out(routing: RoutingKind) -> None:
    model = tiny_model(routing, num_hidden_layers=1, is_dlo=[True], **LARGE, **SCALED)
    layer, active = model.model.layers[0], MIXED[0]
    stream = model.model.embed_tokens(IDS)
    attended = []
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "routers" not in name})
    plain.model.layers[0].self_attn.register_forward_hook(lambda _module, _args, output: attended.append(output[0]))
    if routing == "attention":
        plain(IDS)
    else:  # whom nobody sees need not be there
        mask = torch.full((2, 1, 11, 11), torch.finfo(torch.float32).min).triu(1)
        plain(IDS, attention_mask=mask.masked_fill(~active[:, None, None], torch.finfo(torch.float32).min))
    scale = 0.5 * 1.5 + (torch.sigmoid(stream @ model.model.router(0).weight[0]) - 0.5) * 0.4
    after = stream + torch.where(active[..., None], scale[..., None] * attended[0], 0)
    wanted = after + layer.mlp(layer.post_attention_layernorm(after))
    found = model.model(IDS, force_active={0: active}, use_cache=False)
    np.testing.assert_allclose(found.last_hidden_state, model.model.norm(wanted), atol=1e-5)


@torch.no_grad()
def test_only_queries_of_active_tokens_are_computed_when_skipped_ones_leave_keys() -> None:
    model, rows = tiny_model("attention"), {}
    layer = model.model.layers[1]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp"):
        layer.get_submodule(name).register_forward_hook(
            lambda _module, args, _output, name=name: rows.setdefault(name, []).append(args[0].numel() // 24)
        )
    force = torch.zeros(2, 11, dtype=torch.bool)
    force[0, 3] = force[1, 9] = force[1, 10] = True
    model(IDS, force_active={1: force})
    query, key = [3], [22]
    assert rows == {
        **{"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key},
        **{"self_attn.o_proj": query, "mlp": [22]},
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["all", "active"])
def test_checkpoint_says_whose_keys_it_keeps_when_saved(kind: str, tmp_path: Path) -> None:
    model = tiny_model("attention" if kind == "all" else "attention-active")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["attention_routing_kv"]) == ("llama_dlo_attn", kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.routing == model.config.routing
    np.testing.assert_array_equal(loaded(IDS).logits, model(IDS).logits)
    read = LlamaConfig.from_json(tmp_path / "config.json")
    assert read.routing is not None
    assert read.routing.kind == model.config.routing


def test_config_raises_when_it_keeps_other_keys() -> None:
    with pytest.raises(RoutingConfigError, match="attention_routing_kv is 'some', expected 'all' or 'active'"):
        tiny_model("attention", attention_routing_kv="some")


# Training.


def test_similarity_is_that_of_a_layer_that_nobody_skips() -> None:
    model = tiny_model("layer", num_hidden_layers=1, is_dlo=[True], **LARGE, **SCALED)
    selected = torch.arange(22).reshape(2, 11) % 2 > 0
    output = model(IDS, use_cache=False, select_tokens=everywhere(model, lambda _scores: selected))
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "routers" not in name})
    before = plain.model.embed_tokens(IDS)
    layers = []
    plain.model.layers[0].register_forward_hook(lambda _module, _args, after: layers.append(after))
    plain(IDS)
    wanted = F.cosine_similarity(before, layers[0], dim=-1)
    np.testing.assert_allclose(output.training_routing[0].similarity, wanted.detach(), atol=1e-6)


def test_selection_is_refused_behind_cached_tokens() -> None:
    model = tiny_model("layer")
    cache = fed(model, 3)
    with pytest.raises(ValueError, match="takes no cached tokens"):
        model(IDS[:, 3:], past_key_values=cache, select_tokens=everywhere(model, lambda scores: scores > 0))


def test_documents_that_share_a_sequence_do_not_see_each_other_in_training() -> None:
    model = tiny_model("layer", **LARGE)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]).expand(2, -1)
    active = torch.arange(22).reshape(2, 11) % 3 > 0
    both = model(IDS, position_ids=positions, use_cache=False, select_tokens=everywhere(model, lambda _scores: active))
    second = model(IDS[:, 5:], use_cache=False, select_tokens=everywhere(model, lambda _scores: active[:, 5:]))
    np.testing.assert_allclose(both.logits[:, 5:].detach(), second.logits.detach(), atol=1e-5)
    for layer in range(3):
        found, wanted = (output.training_routing[layer].similarity for output in (both, second))
        np.testing.assert_allclose(found[:, 5:], wanted, atol=1e-6)


def test_gradients_are_finite_when_padding_and_selection_hide_everything() -> None:
    model = tiny_model("layer")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :5] = 0
    none = torch.zeros(2, 11, dtype=torch.bool)
    labels = IDS.masked_fill(mask == 0, -100)
    output = model(
        IDS, attention_mask=mask, labels=labels, use_cache=False, select_tokens=everywhere(model, lambda _scores: none)
    )
    output.loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(router.weight.grad.abs().sum() > 0 for router in model.model.routers.values())
