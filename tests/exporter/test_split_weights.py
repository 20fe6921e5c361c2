"""Weights in several files: everybody who reads an artefact finds them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.written_files import written_names
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.commands.numbers import byte_count
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.weight_file import weight_paths
from dlo_export.runtimes.errors import ModelLoadError
from tests.exporter.test_genai import generate
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

LIMIT = 30_000  # bytes; the embedding is larger, everything else smaller


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_llama(
        folder / "model", vocab=BYTE_VOCABULARY + 1, routed=(True, False, True), tokenizer=True, legacy_keys=True
    )


@pytest.fixture(scope="module")
def split(model: Path) -> Path:
    """Compared with PyTorch: the masked graph finds its weights in the files of the lowered one."""
    request = ExportRequest(str(model), model.parent / "split", weight_file_bytes=LIMIT)
    assert export_model(request, Reporter()).description.parity.verdict == "PASS"
    return request.output


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    request = ExportRequest(str(model), model.parent / "whole", parity=False)
    export_model(request, Reporter())
    return request.output


def test_files_are_below_the_limit_when_they_hold_more_than_one_tensor(split: Path) -> None:
    tensors = onnx.load(split / "model.onnx", load_external_data=False).graph.initializer
    places = [{each.key: each.value for each in tensor.external_data} for tensor in tensors if tensor.external_data]
    by_file = {name: list(rows) for name, rows in itertools.groupby(places, lambda place: place["location"])}
    paths = weight_paths(split)
    assert [path.name for path in paths] == [*by_file]
    assert [path.name for path in paths][:2] == ["model.onnx.data", "model.onnx.data_1"]
    for path, rows in zip(paths, by_file.values(), strict=True):
        assert path.stat().st_size == int(rows[-1].get("offset", 0)) + int(rows[-1]["length"])
        assert path.stat().st_size <= LIMIT or len(rows) == 1
    assert paths[0].stat().st_size > LIMIT, "the embedding stands alone"
    # As few as in this order can be: what begins a file would not have fitted the one before.
    for before, after in itertools.pairwise(by_file.values()):
        assert int(before[-1].get("offset", 0)) + int(before[-1]["length"]) + int(after[0]["length"]) > LIMIT


def test_description_and_list_of_files_name_all_of_them(split: Path) -> None:
    names = {path.name for path in weight_paths(split)}
    assert len(names) > 3
    assert {file.name.name for file in open_description(split).files} == {"model.onnx", *names}
    assert names <= set(written_names(split))


def test_runtimes_compute_the_same_when_weights_are_split(split: Path, whole: Path) -> None:
    prompt = np.random.default_rng(0).integers(3, BYTE_VOCABULARY, (1, 7))
    assert generate(split, prompt) == generate(whole, prompt), "onnxruntime-genai"
    logits = []
    for folder in (split, whole):
        with open_artefact(folder) as runner:
            runner.reset(1)
            logits.append(runner.step(prompt, np.ones_like(prompt), np.arange(7)[np.newaxis]).logits)
    np.testing.assert_array_equal(*logits)


def test_a_missing_file_is_named_and_force_replaces_all(split: Path, model: Path) -> None:
    last = weight_paths(split)[-1]
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(ModelLoadError, match=f"{last.name}: does not exist"):
        open_artefact(split)
    last.write_bytes(content)
    export_model(ExportRequest(str(model), split, parity=False, force=True, weight_file_bytes=10**9), Reporter())
    assert [path.name for path in weight_paths(split)] == ["model.onnx.data"]
    assert not last.exists()


@pytest.mark.parametrize(
    ("text", "count"),
    [("500000", 500_000), ("2GB", 2_000_000_000), ("4 GiB", 4 << 30), ("1.5mb", 1_500_000), ("64KiB", 1 << 16)],
)
def test_size_is_read_when_it_has_a_unit_or_none(text: str, count: int) -> None:
    assert byte_count("--external-data-size", text) == count


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1GB", "2 gigabytes", "1e9", "GB", "nan", "0.1B", "٣GB", "9" * 16])
def test_size_is_refused_by_its_option_when_it_is_none(text: str) -> None:
    with pytest.raises(InputError, match="--external-data-size") as refused:
        byte_count("--external-data-size", text)
    assert "2GB" in refused.value.hint or "GiB" in refused.value.hint
