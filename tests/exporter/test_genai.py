"""An artefact folder as it is in onnxruntime-genai: it loads, tokenizes, and generates PyTorch's greedy tokens."""

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from transformers import AutoModelForCausalLM

import dlo_export.modeling.llama_dlo  # noqa: F401 - registers the routed models with AutoModelForCausalLM
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

PROMPT_LENGTH, LENGTH = 7, 27
VARIANTS = {
    "plain": {},
    "tied": {"tie": True},
    "routed": {"routed": [True, False, True]},
    "last logits": {"last_logits": True},
    "attention routed": {"routed": [True, False, True], "model_type": "llama_dlo_attn"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    variant = dict(VARIANTS[request.param])
    last_logits = variant.pop("last_logits", False)
    model = save_tiny_llama(root / "model", vocab=BYTE_VOCABULARY + 1, tokenizer=True, **variant)
    export_model(ExportRequest(str(model), root / "artefact", parity=False, last_logits=last_logits), Reporter())
    return model, root / "artefact"


def test_genai_generates_pytorch_greedy_tokens_when_given_an_artefact(folders):
    model, artefact = folders
    prompt = np.random.default_rng(0).integers(3, BYTE_VOCABULARY, (1, PROMPT_LENGTH))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference.generate(
            torch.from_numpy(prompt), do_sample=False, max_length=LENGTH, min_length=LENGTH, eos_token_id=None
        )
    assert generate(artefact, prompt) == expected[0].tolist()


def test_genai_tokenizes_as_the_checkpoint_does_when_given_an_artefact(folders):
    tokenizer = og.Tokenizer(og.Model(str(folders[1])))
    assert tokenizer.decode(tokenizer.encode("skip it")) == "skip it"


def generate(artefact, prompt):
    """Greedy tokens, the prompt's included."""
    model = og.Model(str(artefact))
    options = og.GeneratorParams(model)
    # min_length keeps a random model from stopping early, as in the reference.
    options.set_search_options(do_sample=False, max_length=LENGTH, min_length=LENGTH)
    generator = og.Generator(model, options)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()
