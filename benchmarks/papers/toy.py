"""A tiny model, made and taught where it is needed, so that the command can be tried within a minute.

It knows no more than some hundred steps on docstrings teach. What the experiments say about it is no result.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.papers.experiment import Experiment
from benchmarks.papers.forms import Form
from benchmarks.papers.results import Results
from benchmarks.papers.subjects import BaseModel
from benchmarks.papers.text import TRAINING
from benchmarks.papers.training import TrainingRun, train
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.modeling.training.records import read_records

_VOCABULARY, _LAYERS, _STEPS = 512, 5, 100
TOY_TOKENS = 50_000
"""Of text to teach it."""
_END = "<|endoftext|>"


def toy_model(results: Results, form: Form) -> Path:
    """The model's folder; made if it is not there.

    Args:
        results: Where the text is, and where the model goes.
        form: Of its training.
    """
    folder = results.model("toy")
    if folder.exists():
        return folder
    untaught = results.model("toy-untaught")
    if not untaught.exists():
        with whole_folder(untaught) as staging:
            _save_random(staging)
            _save_tokenizer(results.text / TRAINING, staging)
    with BaseModel(untaught) as base:
        experiment = Experiment(base, dataclasses.replace(form, learning_rate=3e-3, curve_points=1), results, "cpu")
        model = base.model()
        train(TrainingRun("toy", lambda _: model), experiment, _STEPS, form.batches[0])
        base.save(model, folder)
    return folder


def _save_random(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _save_tokenizer(training: Path, folder: Path) -> None:
    """A byte-level BPE of the training text."""
    texts = itertools.chain.from_iterable(
        [record.text] if record.text else [turn["content"] for turn in record.messages]
        for record in read_records(training)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END).save_pretrained(folder)
