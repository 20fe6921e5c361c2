import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.tensorrt.float16_range import LARGEST, float16_stream_peak, near_overflow
from tests.runtimes.graphs import save_plain_graph
from tests.tiny_models import save_tiny_llama


def spoilt(folder, factors):
    """A tiny model some of whose weights are multiplied."""
    save_tiny_llama(folder, layers=2)
    tensors = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measured(model, folder):
    save_plain_graph(model, folder)
    with open_checkpoint(model) as checkpoint:
        return float16_stream_peak(folder, checkpoint.config)


def streams_of_transformers(folder):
    """Largest magnitude behind each layer, on the model's first token and 63 random ones."""
    model, peaks = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: peaks.append(float(output.abs().max())))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 64))
    tokens[0, 0] = model.config.bos_token_id
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    return peaks


# The first scales the embedding, and so the whole stream; norms undo it at once.
@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_peak_is_that_of_transformers_when_float16_holds_the_stream(tmp_path, factor):
    model = spoilt(tmp_path / "model", {"model.embed_tokens.weight": factor})
    assert measured(model, tmp_path / "out") == pytest.approx(max(streams_of_transformers(model)), rel=1e-4)


def test_stream_is_refused_with_its_layer_when_it_exceeds_float16(tmp_path):
    model = spoilt(tmp_path / "model", {"model.layers.1.mlp.down_proj.weight": 1e9})
    with pytest.raises(InputError, match=r"--dtype fp16: the residual stream reaches \d+ behind layer 1") as caught:
        measured(model, tmp_path / "out")
    assert "float16 ends at 65504" in str(caught.value)
    assert "hint: use --dtype bf16" in str(caught.value)


# Products of inf in one place, sums of inf and -inf in the other.
@pytest.mark.parametrize(("scaled", "peak"), [("down_proj", "inf"), ("up_proj", "nan")])
def test_stream_is_refused_when_not_even_fp32_holds_it(tmp_path, scaled, peak):
    factors = {f"model.layers.1.mlp.{scaled}.weight": 1e37, "model.layers.1.mlp.gate_proj.weight": 1e3}
    with pytest.raises(InputError, match=f"the residual stream reaches {peak} behind layer 1"):
        measured(spoilt(tmp_path / "model", factors), tmp_path / "out")


def test_overflow_is_near_when_a_stream_takes_more_than_half_the_range():
    assert not near_overflow(LARGEST / 2)
    assert near_overflow(np.nextafter(LARGEST / 2, np.inf))
    assert not near_overflow(0.0)
