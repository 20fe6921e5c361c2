"""SmolLM2-135M deepened, with routers fitted to text: ONNX Runtime's and TensorRT's graphs against the PyTorch model.

tests/data/smollm2_routers is what `dlo calibrate SmolLM2-135M-Instruct.Q4_1.gguf -o DIR --as-adapter` writes.
"""

import functools
import itertools

import numpy as np
import pytest

from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.checkpoints.tokenization.encoder import load_encoder
from dlo_export.exporter.artefact_runner import exposed_model, open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.twin import tensorrt_twin
from dlo_export.modeling.calibration.text import read_documents
from dlo_export.runtimes.onnxruntime.static_cache_runner import StaticCacheRunner
from dlo_export.runtimes.torch.reference import open_reference
from tests.bare_session import left_padded

pytestmark = pytest.mark.smollm2

TOLERANCE = 5e-4
LENGTHS = (64, 41, 23)
DECODED = 8


@pytest.fixture(scope="module")
def artefact_of(smollm2_gguf, smollm2_tli_adapter, tmp_path_factory):
    """The artefact of a lowering, made once."""

    def exported(lowering):
        folder = tmp_path_factory.mktemp("routed") / lowering
        request = ExportRequest(str(smollm2_gguf), folder, adapter=smollm2_tli_adapter, lowering=lowering, parity=False)
        export_model(request, Reporter())
        return folder

    return functools.cache(exported)


@pytest.fixture(scope="module")
def steps(smollm2_gguf, tmp_path_factory):
    """Real text in a left-padded batch: a prefill, then single tokens behind the cache."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with open_checkpoint(smollm2_gguf) as checkpoint:
        checkpoint.save_companions(folder)
    tokens = load_encoder(folder)(read_documents()[0].text)
    cuts = np.cumsum((0, *LENGTHS))
    samples = [np.array(tokens[start:stop])[np.newaxis] for start, stop in itertools.pairwise(cuts)]
    ids, mask, positions = left_padded(samples)
    ends = range(ids.shape[1] - DECODED, ids.shape[1] + 1)
    starts = [0, *list(ends)[:-1]]
    return [(ids[:, a:b], mask[:, :b], positions[:, a:b]) for a, b in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def expected(smollm2_gguf, smollm2_tli_adapter, steps):
    source = open_source(smollm2_gguf, smollm2_tli_adapter)
    config = {**source.base.config.raw, **source.config_values()}
    with open_reference(config, source.tensors()) as reference:
        reference.reset(len(LENGTHS))
        results = [reference.step(*step) for step in steps]
    source.close()
    return results


def check_equal(runner, steps, expected):
    active = total = 0
    runner.reset(len(LENGTHS))
    for (ids, mask, positions), wanted in zip(steps, expected, strict=True):
        got = runner.step(ids, mask, positions)
        real = mask[:, -ids.shape[1] :].astype(bool)
        for layer, scores in wanted.router_scores.items():
            decided = got.router_scores[layer] > 0.5
            np.testing.assert_array_equal(decided[real], (scores > 0.5)[real], err_msg=f"layer {layer}")
            active, total = active + int(decided[real].sum()), total + int(real.sum())
        np.testing.assert_allclose(got.logits[real], wanted.logits[real], rtol=0, atol=TOLERANCE)
    assert 0.5 < active / total < 0.95, "the comparison must see tokens that run and tokens that skip"


@pytest.mark.parametrize("lowering", ["masked", "compact"])
def test_logits_and_decisions_equal_pytorch_when_routers_decide(artefact_of, steps, expected, lowering):
    with open_artefact(artefact_of(lowering)) as runner:
        check_equal(runner, steps, expected)


# Of the artefact the twin takes its weights alone, which are the same whatever its lowering.
@pytest.mark.parametrize("lowering", ["compact", "if", "plugin"])
def test_tensorrt_graph_equals_pytorch_when_batch_is_ragged(
    artefact_of, smollm2_gguf, smollm2_tli_adapter, steps, expected, lowering
):
    artefact = artefact_of("compact")
    source = open_source(smollm2_gguf, smollm2_tli_adapter)
    twin = tensorrt_twin(source, TensorRtOptions(lowering), load_graph(artefact / "model.onnx"))
    source.close()
    with StaticCacheRunner(exposed_model(twin), weights_folder=artefact, name=lowering) as runner:
        check_equal(runner, steps, expected)
