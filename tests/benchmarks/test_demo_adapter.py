"""The comparison of adapters at one rate, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo_adapter import main
from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import router_name
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama


def test_adapters_are_compared_at_one_rate_when_their_own_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model", layers=2, vocab=BYTE_VOCABULARY, tokenizer=True)
    for seed, name in enumerate(("one", "other")):
        rng = np.random.default_rng(seed)
        routers = {router_name(layer): ArrayTensor(rng.standard_normal((1, 32), np.float32)) for layer in (0, 1)}
        save_adapter(DloAdapter("mlp", (True, True), tensors=routers), tmp_path / name)
    folders, options = [model, tmp_path / "one", tmp_path / "other"], ["--target", "0.8", "--tokens", "512"]
    monkeypatch.setattr(sys, "argv", ["demo_adapter", *map(str, folders), *options, "--threads", "1"])
    main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert results["dense"]["active"] == 1
    for name in ("one", "other"):
        assert abs(results[name]["as it is"]["active"] - 0.8) > 0.05
        assert results[name]["shifted"]["active"] == pytest.approx(0.8, abs=0.03)
        assert results[name]["shifted"]["perplexity"] != results[name]["as it is"]["perplexity"]
