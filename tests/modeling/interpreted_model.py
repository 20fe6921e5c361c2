"""Runs a model's MLPs in the kernels under Triton's interpreter and prints, as JSON, how it differs from itself.

A program of its own, because TRITON_INTERPRET must be set before triton is imported; its argument is a folder to use.
"""

import copy
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.model_kernels import compare_with_itself
from dlo_export.checkpoints.errors import DloError
from dlo_export.modeling import decoder_layer
from dlo_export.modeling.active_tokens import ActiveTokens
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.runtimes.torch.captured.step_weights import StepWeights
from tests.runtimes.captured_cases import tiny_model, tokens_of

IDS = tokens_of(2, 8)  # rows of one tile: test_kernels_interpreted.py has more
PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0  # left padding
MIXED = {layer: (IDS + layer) % 3 == 0 for layer in (0, 2)}


class NobodyAsks(ActiveTokens):
    """In place of the rows that the host would have to count."""

    def __init__(self, active: torch.Tensor) -> None:
        raise AssertionError("a decision was asked for on the host")


def both(model: LlamaDloForCausalLM, **options: object) -> tuple[float, float]:
    """Largest difference of logits, and of the caches behind them and one token more, in the kernels and without."""
    outputs = []
    for kernels in (False, True):
        model.skip_kernels = kernels
        decoder_layer.ActiveTokens = NobodyAsks if kernels else ActiveTokens
        with torch.inference_mode():
            first = model(input_ids=IDS, attention_mask=PADDED, **options)
            further = torch.cat([PADDED, PADDED[:, -1:]], 1)
            second = model(input_ids=IDS[:, :1], attention_mask=further, past_key_values=first.past_key_values)
        scores = torch.cat(list(first.router_scores.values()))
        active = torch.cat([*first.router_scores.values()]) > 0.5
        assert 0 < active.float().mean() < 1, "some are active"
        outputs.append([first.logits, second.logits, scores])
    return tuple(float((a.float() - b.float()).abs().max()) for a, b in zip(*outputs, strict=True))


def refusal(model: LlamaDloForCausalLM) -> list[object]:
    """What the model says of kernels that it does not take, and what `auto` makes of it."""
    model.skip_kernels = "auto"
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        model.skip_kernels = True
        try:
            model(input_ids=IDS)
        except DloError as err:
            return [type(err).__name__, err.exit_code, str(err), bool(torch.isfinite(expected).all())]
    return []


def gradients(model: LlamaDloForCausalLM) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def storage_bytes(model: LlamaDloForCausalLM) -> int:
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in model.parameters()}
    return sum(storages.values())


def main(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    model = tiny_model(folder / "model")
    fresh, before = copy.deepcopy(model), storage_bytes(model)
    found["plain layers"] = model.model.layers[0].mlp.up_proj.weight.is_contiguous()
    found["scaled, thresholds, padding, cache"] = both(model)
    found["turned layers"] = [layer.mlp.up_proj.weight.is_contiguous() for layer in model.model.layers]
    found["forced"] = both(model, force_active=MIXED)
    for name, active in (("none", False), ("all", True)):
        found[name] = both(model, force_active={layer: torch.full_like(IDS, active).bool() for layer in (0, 2)})
    found["not scaled, biases of attention"] = both(tiny_model(folder / "bias", attention_bias=True, rescale=False))
    for kind in (torch.float16, torch.bfloat16):
        found[str(kind)] = both(copy.deepcopy(fresh).to(kind))

    decoder_layer.ActiveTokens = ActiveTokens
    found["as on a GPU"] = compare_with_itself(copy.deepcopy(fresh), True)

    generated = []
    for kernels in (False, True):
        model.skip_kernels = kernels
        decoder_layer.ActiveTokens = NobodyAsks if kernels else ActiveTokens
        generated.append(model.generate(IDS, attention_mask=PADDED, max_new_tokens=4, do_sample=False, pad_token_id=0))
    decoder_layer.ActiveTokens = ActiveTokens
    found["tokens differ"] = int((generated[0] != generated[1]).sum())

    # What ran in the kernels, in inference mode, is the same model: its weights, its size, its gradients, its files.
    stored = {name: bool(torch.equal(value, fresh.state_dict()[name])) for name, value in model.state_dict().items()}
    found["same weights"], found["same size"] = all(stored.values()), storage_bytes(model) == before
    expected = gradients(fresh)
    found["gradients"] = max(float((g - expected[name]).abs().max()) for name, g in gradients(model).items())
    model.save_pretrained(folder / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    found["saved"] = all(torch.equal(value, fresh.state_dict()[name]) for name, value in again.state_dict().items())
    gate = model.model.layers[0].mlp.gate_proj.weight
    found["shared with a step"] = StepWeights(model, kernels=True).layers[0].mlp.gate.data_ptr() == gate.data_ptr()
    model.masked = True  # the oracle, whatever is asked for
    model.skip_kernels = True
    run, decoder_layer.skip_mlp = decoder_layer.skip_mlp, None
    with torch.inference_mode():
        found["masked"] = bool(torch.isfinite(model(input_ids=IDS).logits).all())
    decoder_layer.skip_mlp = run

    hooked = tiny_model(folder / "hooked")
    hooked.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: None)
    adapted = tiny_model(folder / "adapted")
    adapted.model.layers[2].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[2].mlp.up_proj)
    shared = tiny_model(folder / "shared")
    StepWeights(shared, kernels=False)
    found["refused"] = {
        "width": refusal(tiny_model(folder / "width", intermediate=60)),
        "bias": refusal(tiny_model(folder / "mlp_bias", mlp_bias=True)),
        "hook": refusal(hooked),
        "class": refusal(adapted),
        "storage": refusal(shared),
        "double": refusal(tiny_model(folder / "double", torch.float64)),
    }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(main(Path(sys.argv[1])), sys.stdout)
