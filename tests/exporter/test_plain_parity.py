"""SmolLM2-135M without routers, as it is and deepened by layers that pass everything on, against transformers."""

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from transformers import AutoModelForCausalLM

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.checkpoints.tokenization.encoder import load_encoder
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.bare_session import BareSession, left_padded
from tests.checkpoints.equal_tensors import check_equals_transformers

pytestmark = pytest.mark.smollm2

TOLERANCE = 5e-4
NEW_TOKENS = 64
GENAI_TOKENS = 16  # of the same ones: it opens the artefact in its own way, and computes in the same runtime
PROMPT = "A compiler reads a program in one language and writes it in another. Its passes"


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    """Read by transformers itself, so that our reading of the GGUF is under test too."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompt(smollm2_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with open_checkpoint(smollm2_gguf) as checkpoint:
        checkpoint.save_companions(folder)
    return np.array(load_encoder(folder)(PROMPT))[np.newaxis]


@pytest.fixture(scope="module")
def greedy(reference, prompt):
    ids = torch.from_numpy(prompt)
    with torch.inference_mode():
        tokens = reference.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return tokens[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module", params=["plain", "tli_zero_out"])
def artefact(request, smollm2_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    adapter = None
    if request.param == "tli_zero_out":
        adapter = folder / "adapter"
        with open_checkpoint(smollm2_gguf) as checkpoint:
            plan = placements("tli", checkpoint.config.num_layers, every=5, init="zero_out")
            save_adapter(expansion_adapter(checkpoint.tensors, plan), adapter)
    export_model(ExportRequest(str(smollm2_gguf), folder / "artefact", adapter=adapter, parity=False), Reporter())
    return folder / "artefact"


@pytest.fixture(scope="module")
def session(artefact):
    return BareSession(artefact / "model.onnx")


def test_checkpoint_equals_transformers_when_read_from_the_wheel(smollm2_gguf, reference):
    with open_checkpoint(smollm2_gguf) as checkpoint:
        assert checkpoint.stored_dtype == "Q4_1"
        assert checkpoint.config.tie_word_embeddings
        check_equals_transformers(checkpoint, reference)


def test_artefact_has_the_layers_it_was_asked_for(artefact, session):
    assert len(session.past) == 2 * (36 if "tli" in str(artefact) else 30)


def test_logits_equal_transformers_when_prefilled_and_decoded_with_left_padding(session, reference):
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 49152, (1, length)) for length in (24, 17)]
    ids, mask, positions = left_padded(samples)
    logits = session.logits_of(ids, mask, positions, cuts=[20, 21, 24])
    for row, sample in enumerate(samples):
        with torch.inference_mode():
            expected = reference(torch.from_numpy(sample)).logits[0].numpy()
        np.testing.assert_allclose(logits[row, -sample.shape[1] :], expected, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_equal_transformers_when_64_are_generated(session, prompt, greedy):
    session.reset(1)
    tokens, ids, length = [], prompt, 0
    for _ in range(NEW_TOKENS):
        positions = np.arange(length, length + ids.shape[1])[np.newaxis]
        length += ids.shape[1]
        logits = session.step(ids, np.ones((1, length)), positions)["logits"]
        tokens.append(int(logits[0, -1].argmax()))
        ids = np.array([[tokens[-1]]])
    assert tokens == greedy


def test_greedy_tokens_equal_transformers_when_genai_generates_them(artefact, prompt, greedy):
    model = og.Model(str(artefact))
    options = og.GeneratorParams(model)
    length = prompt.shape[1] + GENAI_TOKENS
    options.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, options)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist()[prompt.shape[1] :] == greedy[:GENAI_TOKENS]
