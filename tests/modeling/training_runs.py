"""Tiny models, chats and runs for the tests of training."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import socket
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.documents import TokenDocument, tokenize_records
from dlo_export.modeling.training.measuring import Measuring
from dlo_export.modeling.training.packing import PackedDocuments, PackedSets
from dlo_export.modeling.training.records import read_records
from dlo_export.modeling.training.reports import StepReport
from dlo_export.modeling.training.run import TrainingResult, train_model
from dlo_export.modeling.training.run_folder import RunFolder
from dlo_export.modeling.training.settings import TrainingSettings
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

WORDS = ["the", "a", "model", "layer", "token", "skips", "runs", "routes", "learns"]
MEASURED = 12  # chats
SETTINGS = TrainingSettings(
    target=0.7,
    anneal_steps=4,
    max_steps=6,
    batch=2,
    sequence=64,
    learning_rate=1e-3,
    warmup=0.0,
    eval_every=100,
    save_every=100,
)


def save_chats(file: Path, count: int = 40) -> Path:
    """Writes random chats, the same ones for the same count."""
    chooser = random.Random(0)
    lines = []
    for _ in range(count):
        question, answer = (" ".join(chooser.choices(WORDS, k=chooser.randint(1, 5))) for _ in range(2))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    file.write_text("\n".join(lines) + "\n")
    return file


def save_routed(folder: Path, **options: Any) -> Path:
    """Writes a tiny routed checkpoint with a byte tokenizer."""
    values = {"layers": 3, "routed": [True, False, True], "vocab": BYTE_VOCABULARY, "tokenizer": True}
    return save_tiny_llama(folder, **{**values, **options})


def opened(folder: Path) -> LlamaDloForCausalLM:
    """The model of a checkpoint."""
    with open_checkpoint(folder) as checkpoint:
        return llama_dlo_from_tensors(checkpoint.config.raw, checkpoint.tensors)


def packed(folder: Path, chats: Path, length: int = 64) -> PackedDocuments:
    """Chats in sequences, by the tokenizer of a checkpoint."""
    return PackedDocuments(_tokenized(folder, chats, length), length)


def packed_sets(folder: Path, chats: Path, length: int = 64) -> PackedSets:
    """Chats to learn, and a few of them to measure on: what a run takes longest for is to measure, a dozen times."""
    documents = _tokenized(folder, chats, length)
    return PackedSets(PackedDocuments(documents, length), PackedDocuments(documents[:MEASURED], length))


def _tokenized(folder: Path, chats: Path, length: int) -> Sequence[TokenDocument]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenize_records(read_records(chats), tokenizer, length=length, long_chats="error").documents


def run(
    model: LlamaDloForCausalLM,
    data: PackedSets,
    folder: Path,
    settings: TrainingSettings = SETTINGS,
    *,
    resume: bool = False,
    report: Callable[[StepReport], None] = lambda _report: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Trains and measures."""
    return train_model(
        model,
        settings,
        data,
        folder=RunFolder(folder),
        description={"settings": dataclasses.asdict(settings), "model": "tiny", "data": "chats"},
        resume=resume,
        report=report,
        should_stop=should_stop,
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    """A run's log, without what depends on the clock."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The log's entries of steps, without those of evaluations."""
    return [entry for entry in log_of(folder) if "loss" in entry]


def run_rank_whose_scores_are_off(
    environment: dict[str, str], model_folder: Path, chats: Path, run_folder: Path, off: float
) -> None:
    """As `run_rank`, the second process measuring rates by other scores; each writes how it shifted thresholds."""
    rank = environment["RANK"]
    if rank != "0":
        own = Measuring._held_out_scores
        Measuring._held_out_scores = lambda self, sequences: {  # type: ignore[method-assign]
            layer: scores.double().add(off).clamp(0, 1).float() for layer, scores in own(self, sequences).items()
        }
    os.environ |= environment
    torch.set_num_threads(1)
    settings = dataclasses.replace(SETTINGS, target=0.9, anneal_steps=0, max_steps=2, rate_weight=0.0)
    model = opened(model_folder)
    result = run(model, packed_sets(model_folder, chats), run_folder, settings)
    assert result.rate_control is not None
    found = {**dataclasses.asdict(result.rate_control), "of_the_model": model.config.router_thresholds}
    run_folder.with_name(f"{run_folder.name}-{rank}.json").write_text(json.dumps(found))


def start_ranks(target: Callable[..., None], *arguments: object) -> list[BaseProcess]:
    """Two processes of a run, given the environment of `accelerate launch`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.modeling.training_runs"])
    ranks: list[BaseProcess] = [
        context.Process(target=target, args=(shared | {"RANK": rank, "LOCAL_RANK": rank}, *arguments))
        for rank in ("0", "1")
    ]
    for rank in ranks:
        rank.start()
    return ranks


def run_rank(environment: dict[str, str], model_folder: Path, chats: Path, run_folder: Path) -> None:
    """One process of a run of several, which its environment describes as `accelerate launch` would."""
    os.environ |= environment
    torch.set_num_threads(1)
    run(opened(model_folder), packed_sets(model_folder, chats), run_folder)
