"""What all experiments share: the model, the text in tokens, the device, the results."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.papers.forms import Form
from benchmarks.papers.results import Results
from benchmarks.papers.subjects import BaseModel
from benchmarks.papers.text import DOMAINS, HELD_OUT, TRAINING, domain_file
from benchmarks.papers.token_cache import cached_documents
from dlo_export.checkpoints.errors import InputError
from dlo_export.modeling.calibration.evaluation import Evaluation, evaluate
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings, calibrate_routers
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.perplexity import perplexity
from dlo_export.modeling.training.compilation import uncompiled
from dlo_export.modeling.training.documents import TokenDocument, tokenize_records
from dlo_export.modeling.training.packing import PackedDocuments, PackedSets
from dlo_export.modeling.training.records import read_records

DecideShape = Callable[[torch.Size], Mapping[int, torch.Tensor]]
"""Decisions by layer for a batch's shape, [batch, sequence]."""


class Experiment:
    """Shared state; text becomes tokens when it is first asked for.

    Args:
        base: What everything is made from.
        form: How large everything is.
        results: Where results go, and where the text is.
        device: "cpu" or "cuda".
        tasks: Folder of log-likelihood tasks, or None.
    """

    def __init__(self, base: BaseModel, form: Form, results: Results, device: str, tasks: Path | None = None) -> None:
        self.base = base
        self.form = form
        self.results = results
        self.device = device
        self.tasks = tasks
        self._routers: dict[tuple[str, float], dict[int, np.ndarray]] = {}

    def prepare(self, *, warm_up: bool = True) -> str:
        """Turns all text into tokens, so that no measurement does; says how much there is.

        Args:
            warm_up: Run the model once on a GPU: the first pass loads its kernels, and the first one that is measured
                is what all others are estimated by.
        """
        if warm_up and self.device != "cpu":
            self.measured(self.base.model())
        sequences = {"to learn": len(self.data.training), "held out": len(self.data.held_out)}
        sequences |= {domain: len(windows) for domain, windows in self.windows.items()}
        return ", ".join(f"{count} sequences {name}" for name, count in sequences.items())

    @functools.cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """Held-out text by domain, int64 [windows, sequence], as many windows in each."""
        count = max(1, self.form.held_out_tokens // self.form.sequence)
        found = {}
        for domain in DOMAINS:
            lines = (self.results.text / domain_file(domain)).read_text(encoding="utf-8").splitlines()
            texts = {document["name"]: document["text"] for document in map(json.loads, lines)}
            found[domain] = drawn_windows({name: self.base.encode(text) for name, text in texts.items()}, count, self)
        return found

    @functools.cached_property
    def watched(self) -> dict[str, torch.Tensor]:
        """Of the mix that runs are watched on, the half that no threshold is fitted on: int64 [windows, sequence].

        Documents stand one behind the other, at most as many windows as of all domains together.
        """
        sequences = [self.data.held_out[index] for index in self.data.not_fitted]
        tokens = torch.cat([sequence["input_ids"][sequence["counted"]] for sequence in sequences])
        length = min(self.form.sequence, len(tokens))
        windows = tokens[: len(tokens) // length * length].reshape(-1, length)
        return {"watched": windows[: sum(map(len, self.windows.values()))]}

    @functools.cached_property
    def data(self) -> PackedSets:
        """Text to learn from and to watch runs on, in sequences."""
        return PackedSets(*(self._packed(documents) for documents in (self._training, self._held_out)))

    @functools.cached_property
    def calibration(self) -> torch.Tensor:
        """Training text to fit routers on and to choose what is removed, int64 [windows, sequence]."""
        length = self.form.sequence
        wanted = self.form.calibration_tokens // length * length
        tokens: list[int] = []
        for document in self._training:
            tokens += document.tokens.tolist()
            if len(tokens) >= wanted:
                break
        windows = len(tokens[:wanted]) // length
        return torch.tensor(tokens[: windows * length], dtype=torch.int64).reshape(windows, length)

    def placed(self, model: LlamaDloForCausalLM) -> LlamaDloForCausalLM:
        """The model, on the device."""
        torch.nn.Module.to(model, self.device)  # PreTrainedModel's takes the same and says otherwise
        return model

    def calibrated(self, name: str, model: LlamaDloForCausalLM, share: float) -> dict[int, np.ndarray]:
        """Routers fitted to a model; each model's once for each share, whichever process asks first.

        Args:
            name: Of the model.
            model: Dense; moved to the device.
            share: Of the MLPs that are no identities, to run.
        """
        key = (name, share)
        if key not in self._routers:
            file = self.results.folder / "routers" / f"{name.replace(' ', '-')}-{share:.6f}.npz"
            if not file.exists():
                settings = CalibrationSettings(target_active=share)
                _save_routers(file, calibrate_routers(self.placed(model), self.calibration, settings).routers)
            with np.load(file) as stored:
                self._routers[key] = dict(zip(stored["layers"].tolist(), stored["routers"], strict=True))
        return self._routers[key]

    def measured(
        self,
        model: LlamaDloForCausalLM,
        decide: DecideShape | None = None,
        windows: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Loss, and share of all MLPs that run, of each domain and of all together, as at inference.

        Args:
            model: Moved to the device.
            decide: Decisions to try in place of the routers', for a batch's shape.
            windows: Other text than the domains, by name.
        """
        self.placed(model).eval()
        with uncompiled():
            return self._measured(model, decide, self.windows if windows is None else windows)

    def _measured(
        self, model: LlamaDloForCausalLM, decide: DecideShape | None, windows: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        decide_batch = None if decide is None else lambda _batch, shape: decide(shape)
        found = {
            domain: as_json(evaluate(model, text.to(self.device), decide_batch), model.config.num_hidden_layers)
            for domain, text in windows.items()
        }
        # Domains have as many tokens each, so their mean is that of all tokens.
        means = {key: sum(values[key] for values in found.values()) / len(found) for key in ("loss", "active")}
        return {"all": means | {"perplexity": perplexity(means["loss"], 1)}, "domains": found}

    def _packed(self, documents: Sequence[TokenDocument]) -> PackedDocuments:
        return PackedDocuments(documents, self.form.sequence)

    @functools.cached_property
    def _training(self) -> list[TokenDocument]:
        return self._tokenized(TRAINING)

    @functools.cached_property
    def _held_out(self) -> list[TokenDocument]:
        return self._tokenized(HELD_OUT)

    def _tokenized(self, name: str) -> list[TokenDocument]:
        file, length = self.results.text / name, self.form.sequence

        def make() -> list[TokenDocument]:
            records = read_records(file)
            return tokenize_records(records, self.base.tokenizer, length=length, long_chats="skip").documents

        return cached_documents(self.results.folder / "tokens", file, self.base.tokenizer, length, make)


def _save_routers(file: Path, routers: Mapping[int, np.ndarray]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".partial-{os.getpid()}")  # several processes may make the same
    with partial.open("wb") as stream:
        np.savez(stream, layers=np.array([*routers]), routers=np.stack([*routers.values()]))
    os.replace(partial, file)


def drawn_windows(documents: Mapping[str, Sequence[int]], count: int, experiment: Experiment) -> torch.Tensor:
    """The first windows of all documents, then their second ones, and so on.

    Args:
        documents: Tokens by name.
        count: Of windows.
        experiment: Says how long a window is.

    Returns:
        int64 [count, sequence].

    Raises:
        InputError: The documents are too short.
    """
    length = experiment.form.sequence
    names = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    longest = max(map(len, documents.values()), default=0)
    places = [(start, name) for start in range(0, longest, length) for name in names]
    windows = [
        documents[name][start : start + length] for start, name in places if start + length <= len(documents[name])
    ]
    if len(windows) < count:
        raise InputError(
            f"held-out text: has {len(windows)} windows of {length} tokens, expected {count}",
            hint="install more packages with permissive licences, or take a smaller form",
        )
    return torch.from_numpy(np.asarray(windows[:count], np.int64))


def as_json(evaluation: Evaluation, layers: int) -> dict[str, Any]:
    """An evaluation of a model of so many layers; `active` is the share of all their MLPs that ran."""
    rates = evaluation.active_rates
    return {
        "loss": math.log(evaluation.perplexity),
        "perplexity": evaluation.perplexity,
        "active": 1 - sum(1 - rate for rate in rates.values()) / layers,
        "active_by_layer": {str(layer): round(rate, 4) for layer, rate in rates.items()},
    }
