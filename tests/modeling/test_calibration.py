import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.checkpoints.tokenization.encoder import load_encoder
from dlo_export.modeling.calibration.evaluation import evaluate, with_routers
from dlo_export.modeling.calibration.layer_stream import LayerStream
from dlo_export.modeling.calibration.router_calibration import CalibrationError, CalibrationSettings, calibrate_routers
from dlo_export.modeling.calibration.router_fit import fit_router
from dlo_export.modeling.calibration.skip_labels import (
    is_massive,
    label_rates,
    label_weights,
    lowest,
    protected_similarity,
)
from dlo_export.modeling.calibration.text import (
    CalibrationTextError,
    Document,
    calibration_text,
    evaluation_sequences,
    read_documents,
)
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from tests.tiny_models import save_tiny_llama

LAYERS, LENGTH = 6, 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """A random Llama, the MLPs of some layers scaled down so that skipping them is cheap; layer 2 an identity."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=LAYERS, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer, factor in ((1, 0.2), (2, 0.0), (4, 0.2)):
        for parameter in model.model.layers[layer].mlp.down_proj.parameters():
            parameter.data *= factor
    return model


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.randint(97, (64, LENGTH), generator=torch.Generator().manual_seed(0))


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(["the", "a", "model", "layer", "tokens"], k=count))


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_calibration_is_refused_when_the_stream_is_longer_than_float32_can_tell(
    sequences: torch.Tensor, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "model", layers=2)).eval()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e30
    with pytest.raises(CalibrationError, match="layer 1: the residual stream"):
        calibrate_routers(model, sequences[:8])


def test_text_comes_from_different_documents_when_split() -> None:
    documents = [Document(f"d{index}", words(100, index)) for index in range(10)]
    text = calibration_text(documents, encode, calibration_tokens=320, evaluation_tokens=200, sequence_length=64)
    assert text.calibration.shape == (5, 64)
    assert text.evaluation.shape == (3, 64)
    assert not set(text.calibration_documents) & set(text.evaluation_documents)


def test_evaluation_text_stays_when_only_the_calibration_seed_changes() -> None:
    documents = [Document(f"d{index}", words(100, index)) for index in range(10)]
    sizes = {"calibration_tokens": 256, "evaluation_tokens": 128, "sequence_length": 64}
    first, second = (calibration_text(documents, encode, seed=seed, **sizes) for seed in (0, 1))
    assert first.evaluation_documents == second.evaluation_documents
    assert torch.equal(first.evaluation, second.evaluation)
    assert first.calibration_documents != second.calibration_documents


def test_text_raises_when_there_is_too_little() -> None:
    documents = [Document("only", words(100, 0))]
    with pytest.raises(CalibrationTextError, match="calibration: the documents left have 0 tokens, expected 64"):
        calibration_text(documents, encode, calibration_tokens=64, evaluation_tokens=64, sequence_length=64)
    with pytest.raises(CalibrationTextError, match="10 tokens make no sequence of 64"):
        calibration_text(documents, encode, evaluation_tokens=10, sequence_length=64)


def test_evaluation_draws_the_same_alone_and_needs_no_text_to_calibrate_on() -> None:
    documents = [Document(f"d{index}", words(100, index)) for index in range(10)]
    both = calibration_text(documents, encode, calibration_tokens=64, evaluation_tokens=200, sequence_length=64)
    alone = evaluation_sequences(documents, encode, 200, origin="texts", sequence_length=64)
    assert torch.equal(both.evaluation, alone)
    only = evaluation_sequences(documents[:1], encode, 100, origin="texts", sequence_length=64)
    assert only.shape == (1, 64)
    with pytest.raises(CalibrationTextError, match=r"^a/text\.txt: the documents left have 100 tokens, expected 128"):
        evaluation_sequences(documents[:1], encode, 128, origin="a/text.txt", sequence_length=64)


def test_documents_are_pythons_topics_when_no_path_is_given() -> None:
    documents = read_documents()
    assert len(documents) > 50
    assert sum(len(document.text) for document in documents) > 300_000


def test_documents_are_the_files_when_a_folder_is_given(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "c.md").write_text("three", encoding="utf-8")
    assert read_documents(tmp_path) == (Document("a.txt", "one"), Document("deep/b.txt", "two"))


def test_documents_are_two_parts_when_one_file_is_given(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {index}." for index in range(30))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    beginning, end = read_documents(tmp_path / "book.txt")
    assert beginning.text + end.text == text
    assert end.text.startswith("\n\nParagraph")
    assert read_documents(tmp_path) == (beginning, end)


def test_documents_raise_when_there_are_none_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(CalibrationTextError, match=r"holds no \.txt files"):
        read_documents(tmp_path)
    with pytest.raises(CalibrationTextError, match="no such file or folder"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(CalibrationTextError, match="/dev/null: is no regular file"):
        read_documents(Path("/dev/null"))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(CalibrationTextError, match=r"latin\.txt: is not UTF-8"):
        read_documents(tmp_path / "latin.txt")


def test_documents_raise_by_name_when_a_file_is_a_link_to_itself_or_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("words")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "up").symlink_to("..")  # a loop of folders, which is not followed
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(CalibrationTextError, match=r"loop\.txt: is no regular file\n\nhint: "):
        read_documents(tmp_path)
    (tmp_path / "loop.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CalibrationTextError, match=r"pipe\.txt: is no regular file"):
        read_documents(tmp_path)
    (tmp_path / "pipe.txt").unlink()
    assert {document.name for document in read_documents(tmp_path)} == {"real.txt (beginning)", "real.txt (end)"}


def test_label_rates_pool_all_layers_when_cos_global() -> None:
    similarities = {1: torch.linspace(0.0, 0.5, 100), 5: torch.linspace(0.5001, 1.0, 100)}
    assert label_rates(similarities, "cos-global", skipped_layers=0.5) == pytest.approx({1: 1.0, 5: 0.5})
    assert label_rates(similarities, "cos", skipped_layers=0.5) == {1: 0.75, 5: 0.75}


def test_labels_are_active_where_similarity_is_lowest() -> None:
    assert lowest(torch.tensor([0.9, 0.1, 0.5, 0.7]), 0.5).tolist() == [False, True, True, False]
    # Ties must not let more tokens in.
    assert lowest(torch.full((10,), 0.5), 0.31).sum() == 4


def test_massive_tokens_are_labelled_active_whatever_their_similarity() -> None:
    inputs = torch.ones(10, 4)
    inputs[3, 0] = 500.0
    massive = is_massive(inputs)
    assert massive.nonzero().flatten().tolist() == [3]
    similarity = torch.linspace(0.0, 0.9, 10)
    similarity[3] = 1.0
    assert lowest(protected_similarity(similarity, massive), 0.2).nonzero().flatten().tolist() == [0, 3]


def test_label_weights_grow_with_what_a_wrong_skip_leaves_out() -> None:
    active = torch.tensor([True, True, True, False, False])
    sizes = torch.tensor([0.05, 0.4, 0.0, 0.1, 0.3])
    massive = torch.tensor([False, False, True, False, False])
    weights = label_weights(active, sizes, massive)
    np.testing.assert_allclose(weights, [1.0, (0.4 / 0.1) ** 2, 100.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_fit_router_finds_a_linear_rule_when_there_is_one(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 16, generator=generator)
    # As residual streams do, all tokens share a direction: it is what stands in for a bias.
    inputs[:, 0] = 6.0
    active = inputs[:, 1] + 0.5 * inputs[:, 2] > offset / 4
    inputs[7] *= 1000.0
    decisions = inputs @ fit_router(inputs, active, torch.ones(4000)) > 0
    assert (decisions == active).float().mean() > 0.98
    assert int(decisions.sum()) == pytest.approx(int(active.sum()), abs=2)


def test_fit_router_lets_through_the_labelled_share_when_labels_are_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 8, generator=generator)
    inputs[:, 0] += 10.0
    active = torch.rand(1000, generator=generator) < 0.9
    count = int((inputs @ fit_router(inputs, active, torch.ones(1000)) > 0).sum())
    assert count == pytest.approx(int(active.sum()), abs=2)


@torch.no_grad()
def test_layer_stream_equals_the_model_when_every_layer_runs(tiny: LlamaForCausalLM, sequences: torch.Tensor) -> None:
    expected = tiny.model(sequences[:3], output_hidden_states=True, use_cache=False).hidden_states
    stream = LayerStream(tiny, sequences[:3])
    for layer in range(LAYERS):
        np.testing.assert_allclose(stream.hidden_states, expected[layer], atol=1e-5)
        output = stream.run_layer(layer)
        similarity = F.cosine_similarity(output.kept, output.kept + output.added, dim=-1).reshape(-1)
        np.testing.assert_allclose(output.similarity, similarity, atol=1e-6)
        stream.advance(layer, output)
    np.testing.assert_allclose(tiny.model.norm(stream.hidden_states), expected[LAYERS], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["attention", "attention-active"])
def test_layer_stream_goes_on_with_what_is_left_when_tokens_skip_attention(
    tiny: LlamaForCausalLM, sequences: torch.Tensor, routing: RoutingKind
) -> None:
    active = {layer: torch.rand(sequences[:3].shape) < 0.7 for layer in range(LAYERS)}
    routers = {layer: np.zeros((1, 32), np.float32) for layer in range(LAYERS)}
    routed = with_routers(tiny, routers, routing)
    expected = routed.model(sequences[:3], force_active=active, output_hidden_states=True).hidden_states
    stream = LayerStream(tiny, sequences[:3], routing)
    for layer in range(LAYERS):
        np.testing.assert_allclose(stream.hidden_states, expected[layer], atol=1e-5)
        output = stream.run_layer(layer)
        np.testing.assert_array_equal(output.kept, stream.hidden_states)
        stream.advance(layer, output, active[layer].reshape(-1))
    np.testing.assert_allclose(tiny.model.norm(stream.hidden_states), expected[LAYERS], atol=1e-5)


@torch.no_grad()
def test_layer_stream_goes_on_with_what_is_left_when_tokens_skip_whole_layers(
    tiny: LlamaForCausalLM, sequences: torch.Tensor
) -> None:
    active = {layer: torch.rand(sequences[:3].shape) < 0.7 for layer in range(LAYERS)}
    routers = {layer: np.zeros((1, 32), np.float32) for layer in range(LAYERS)}
    routed = with_routers(tiny, routers, "layer")
    expected = routed.model(sequences[:3], force_active=active, output_hidden_states=True).hidden_states
    stream = LayerStream(tiny, sequences[:3], "layer")
    for layer in range(LAYERS):
        np.testing.assert_allclose(stream.hidden_states, expected[layer], atol=1e-5)
        output = stream.run_layer(layer)
        angles = tiny.model.rotary_emb(stream.hidden_states, torch.arange(LENGTH)[None])
        whole = tiny.model.layers[layer](stream.hidden_states, position_embeddings=angles)
        np.testing.assert_allclose(output.kept + output.added, whole, atol=1e-5)
        similarity = F.cosine_similarity(stream.hidden_states, whole, dim=-1).reshape(-1)
        np.testing.assert_allclose(output.similarity, similarity, atol=1e-6)
        stream.advance(layer, output, active[layer].reshape(-1))
    np.testing.assert_allclose(tiny.model.norm(stream.hidden_states), expected[LAYERS], atol=1e-5)


@pytest.mark.parametrize("labels", ["cos-global", "cos"])
def test_calibration_reaches_the_target_when_measured_on_its_own_text(
    tiny: LlamaForCausalLM, sequences: torch.Tensor, labels: str
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    calls: list[tuple[int, int]] = []
    settings = CalibrationSettings(target_active=0.8, labels=labels, share_every=1)
    calibrated = calibrate_routers(tiny, sequences, settings, progress=lambda *call: calls.append(call))
    assert calibrated.identity_layers == (2,)
    assert not calibrated.routers[2].any()
    assert all(router.shape == (1, 32) and router.dtype == np.float32 for router in calibrated.routers.values())
    measured = evaluate(with_routers(tiny, calibrated.routers), sequences)
    rates = [measured.active_rates.get(layer, 1.0) for layer in range(LAYERS) if layer != 2]
    # The first layer sees 97 different tokens and nothing else, so its rate moves in steps of 1 %.
    assert np.mean(rates) == pytest.approx(0.8, abs=0.03)
    assert measured.active_rates[2] == 0.0
    for layer, rate in calibrated.label_rates.items():
        assert measured.active_rates[layer] == pytest.approx(rate, abs=0.02 if layer else 0.1)
    if labels == "cos":
        assert set(calibrated.label_rates) == {0, 1, 3, 4, 5}
    else:
        # The layers that change the stream least take the skips.
        assert set(sorted(calibrated.label_rates, key=calibrated.label_rates.__getitem__)[:2]) == {1, 4}
    assert calls[-1] == (2 * LAYERS, 2 * LAYERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


@pytest.mark.parametrize("routing", ["layer", "attention", "attention-active"])
def test_calibration_reaches_the_target_when_tokens_skip_attention(
    tiny: LlamaForCausalLM, sequences: torch.Tensor, routing: RoutingKind
) -> None:
    settings = CalibrationSettings(target_active=0.8, routing=routing, share_every=1)
    calibrated = calibrate_routers(tiny, sequences, settings)
    assert calibrated.identity_layers == (), "its attention adds something"
    measured = evaluate(with_routers(tiny, calibrated.routers, routing), sequences)
    rates = [measured.active_rates.get(layer, 1.0) for layer in range(LAYERS)]
    assert np.mean(rates) == pytest.approx(0.8, abs=0.03)


def test_calibration_is_reproducible_when_repeated(tiny: LlamaForCausalLM, sequences: torch.Tensor) -> None:
    first, second = (calibrate_routers(tiny, sequences[:16]) for _ in range(2))
    for layer, router in first.routers.items():
        np.testing.assert_array_equal(router, second.routers[layer])


def test_calibration_routes_only_chosen_layers_when_given(tiny: LlamaForCausalLM, sequences: torch.Tensor) -> None:
    settings = CalibrationSettings(target_active=0.9, layers=(1, 3), share_every=2)
    calibrated = calibrate_routers(tiny, sequences[:32], settings)
    # Layer 2 is an identity: skipping it is free, and counted apart.
    assert set(calibrated.routers) == {1, 2, 3} or set(calibrated.routers) == {1, 2}
    assert np.mean([1 - rate for rate in calibrated.label_rates.values()]) * len(
        calibrated.label_rates
    ) == pytest.approx(0.1 * 5, abs=0.01)


@torch.no_grad()
def test_evaluation_equals_the_models_own_loss_when_nothing_is_routed(
    tiny: LlamaForCausalLM, sequences: torch.Tensor
) -> None:
    loss = tiny(sequences[:5], labels=sequences[:5]).loss
    measured = evaluate(with_routers(tiny, {}), sequences[:5])
    assert measured.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert measured.active_rates == {}
    assert measured.tokens == 5 * LENGTH


def test_evaluation_takes_given_decisions_in_place_of_the_routers(
    tiny: LlamaForCausalLM, sequences: torch.Tensor
) -> None:
    routed = with_routers(tiny, {layer: np.zeros((1, 32), np.float32) for layer in range(LAYERS)})
    assert set(evaluate(routed, sequences[:4]).active_rates.values()) == {0.0}
    everything = evaluate(routed, sequences[:4], lambda _, shape: dict.fromkeys(range(LAYERS), torch.ones(shape) > 0))
    assert set(everything.active_rates.values()) == {1.0}
    assert everything.perplexity == pytest.approx(evaluate(with_routers(tiny, {}), sequences[:4]).perplexity, rel=1e-6)


def test_with_routers_shares_the_models_weights(tiny: LlamaForCausalLM) -> None:
    routed = with_routers(tiny, {1: np.ones((1, 32), np.float32)})
    assert routed.model.layers[0].mlp.up_proj.weight.data_ptr() == tiny.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert routed.config.routed_layers == (1,)
    assert with_routers(routed, {}).config.routed_layers == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_active": 1.0}, "target_active is 1.0, expected a share between 0 and 1"),
        ({"labels": "self"}, "labels is 'self', expected one of cos-global, cos"),
    ],
)
def test_settings_raise_when_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CalibrationSettings(layers=(1, 9)), r"layers \[9\] do not exist, expected 0 to 5"),
        (
            CalibrationSettings(target_active=0.5, layers=(1, 2, 3)),
            "50% active would skip as much as 2.5 layers have, but only 2",
        ),
    ],
)
def test_calibration_raises_when_the_target_is_out_of_reach(
    tiny: LlamaForCausalLM, sequences: torch.Tensor, settings: CalibrationSettings, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate_routers(tiny, sequences[:2], settings)


@pytest.mark.smollm2
def test_calibration_beats_removing_as_many_mlps_when_the_model_is_real(smollm2_gguf: Path, tmp_path: Path) -> None:
    with open_checkpoint(smollm2_gguf) as checkpoint:
        model = llama_dlo_from_tensors(checkpoint.config.raw, checkpoint.tensors)
        checkpoint.save_companions(tmp_path)
    text = calibration_text(read_documents(), load_encoder(tmp_path), calibration_tokens=4096, evaluation_tokens=1024)
    calibrated = calibrate_routers(model, text.calibration)
    routed = evaluate(with_routers(model, calibrated.routers), text.evaluation)
    active = np.mean([routed.active_rates.get(layer, 1.0) for layer in range(30)])
    assert 0.87 < active < 0.93
    assert sum(0.1 < rate < 0.95 for rate in routed.active_rates.values()) >= 5
    # The three MLPs that leave the stream most similar on this text: as many as 10 % of the routers' skips.
    removed = dict.fromkeys((16, 17, 25), np.zeros((1, 576), np.float32))
    static = evaluate(with_routers(model, removed), text.evaluation)
    assert routed.perplexity < 0.9 * static.perplexity
