"""Clients open a routed artefact as it is, and generate the tokens that `dlo run` does."""

import pytest

from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.generation.tokenizer import Tokenizer
from tests.interop.environments import CLIENTS, GENERATING
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama
from tests.tiny_sentencepiece import VOCABULARY, gguf_metadata, train_sentencepiece

pytestmark = pytest.mark.interop

PROMPT = "The capital of France is"
NEW_TOKENS = 24
TEXTS = ("Hello world", "  naïve café — 日本語 🎉", "def f(x):\n    return x**2\n")


# Marks, so that nobody makes an artefact for a client that is not there.
def needing(name):
    return pytest.mark.skipif(not CLIENTS[name].installed, reason=f"{name} is not installed: make test-interop")


def installed(*names):
    return [pytest.param(name, marks=needing(name)) for name in names]


CARRIED = ("routed", "if", "attention", "attention_if", "deepened")


@pytest.fixture(scope="module", params=[*CARRIED, pytest.param("smollm2", marks=pytest.mark.smollm2)])
def artefact(request):
    return request.getfixturevalue(f"{request.param}_artefact")


@pytest.fixture(scope="module")
def prompt(artefact):
    return Tokenizer(artefact).encode(PROMPT)


@pytest.fixture(scope="module")
def expected(artefact, prompt):
    return tokens_of(artefact, [prompt])[0]


def tokens_of(artefact, prompts):
    """What the artefact's runner generates, some tokens skipping and some not."""
    with open_artefact(artefact) as runner:
        generation = generate(
            runner,
            prompts,
            max_new_tokens=NEW_TOKENS,
            end_tokens=GenerationConfig.from_folder(artefact).eos_token_id,
        )
    rates = generation.stats.active_rate.values()
    assert 0 < sum(rates) / len(rates) < 1, "the comparison must see tokens that run and tokens that skip"
    return generation.sequences


@pytest.mark.parametrize("name", installed(*GENERATING))
def test_client_generates_the_runners_tokens_when_given_a_routed_artefact(name, artefact, prompt, expected):
    answer = CLIENTS[name].run(artefact, prompt=prompt, new_tokens=NEW_TOKENS)
    assert answer["tokens"] == expected


@pytest.mark.parametrize("name", installed("genai", "optimum", "transformers_js"))
def test_client_tokenizes_and_generates_as_the_runner_when_given_text(name, artefact, prompt, expected):
    answer = CLIENTS[name].run(artefact, prompt=PROMPT, new_tokens=NEW_TOKENS)
    assert answer == {"prompt": prompt, "tokens": expected}


@pytest.mark.parametrize("kind", ["layer", "active"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("genai", "genai_config.json", marks=needing("genai")),
        pytest.param("optimum", "llama_dlo", marks=needing("optimum")),
        pytest.param("transformers_js", "llama_dlo", marks=needing("transformers_js")),
        pytest.param("onnxruntime_least", "past_active.0", marks=needing("onnxruntime_least")),
    ],
)
def test_client_says_what_it_cannot_carry_when_skipped_tokens_leave_no_keys(name, message, kind, request):
    refusal = CLIENTS[name].refusal(request.getfixturevalue(f"{kind}_artefact"), prompt=[5, 6, 7], new_tokens=2)
    assert message in refusal


@needing("optimum")
def test_optimum_generates_the_runners_tokens_when_a_batch_is_left_padded(artefact, prompt):
    prompts = [prompt, prompt[: len(prompt) // 2]]
    answer = CLIENTS["optimum"].run(artefact, prompt=prompts, new_tokens=NEW_TOKENS)
    for row, wanted in zip(answer["tokens"], tokens_of(artefact, prompts), strict=True):
        assert row[: len(wanted)] == wanted


@needing("genai")
@pytest.mark.parametrize("kind", ["routed", "attention", "last_logits"])
def test_genai_generates_the_runners_tokens_when_it_pads_a_batch_at_the_right(kind, request):
    folder = request.getfixturevalue(f"{kind}_artefact")
    prompts = [Tokenizer(folder).encode(text) for text in (PROMPT, "Hi")]
    answer = CLIENTS["genai"].run(folder, prompt=prompts, new_tokens=NEW_TOKENS)
    for row, wanted in zip(answer["tokens"], tokens_of(folder, prompts), strict=True):
        assert row[: len(wanted)] == wanted


@needing("transformers_4")
@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "sentencepiece"])
def test_transformers_4_gives_the_graphs_inputs_when_the_tokenizer_is_written_from_gguf(kind, tmp_path):
    artefact = gguf_artefact(kind, tmp_path)
    for text in TEXTS:
        answer = CLIENTS["transformers_4"].run(artefact, prompt=text)
        assert answer["inputs"] == ["attention_mask", "input_ids"], "token_type_ids would be one too many"
        assert answer["ids"] == Tokenizer(artefact).encode(text)


def gguf_artefact(kind, folder):
    """An artefact of a tiny GGUF file with a tokenizer of that kind."""
    model = save_tiny_llama(folder / "model", vocab=VOCABULARY)
    metadata = gguf_metadata(train_sentencepiece(folder)) if kind == "sentencepiece" else None
    tokenizer = None if kind == "sentencepiece" else kind
    file = save_tiny_gguf(model, folder / "model.gguf", metadata=metadata, tokenizer=tokenizer)
    export_model(ExportRequest(str(file), folder / "artefact", parity=False), Reporter())
    return folder / "artefact"


@needing("onnxruntime_least")
def test_least_onnxruntime_is_the_version_the_documentation_names(routed_artefact):
    answer = CLIENTS["onnxruntime_least"].run(routed_artefact, prompt=[5, 6, 7], new_tokens=1)
    assert answer["version"] == "1.23.1"
