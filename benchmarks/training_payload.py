"""Prepares what a run of benchmarks.gpu_training reads, so that no time of a GPU goes into it.

    python -m benchmarks.training_payload MODEL FOLDER

FOLDER/text and FOLDER/tokens are the papers' text (benchmarks.papers.text) and its tokens, FOLDER/flops.json what
training costs by kind of run, FOLDER/routers what routed runs start from, as far as that is known before any training.
FOLDER/library is of the
Python standard library alone (PSF licence), for the demo's adapter: modules, and the language reference without the
documents that `dlo calibrate` measures on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.papers.experiment import Experiment
from benchmarks.papers.forms import FORMS
from benchmarks.papers.results import Results
from benchmarks.papers.sources import Unit, files_of, library_units, read_python
from benchmarks.papers.subjects import BaseModel
from benchmarks.papers.text import prepare_text
from benchmarks.papers.training import FLOPS_NAME, flops_per_token, training_runs
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.modeling.calibration.text import calibration_text, read_documents

_TRAINING_TOKENS = 2_000_000
_MODULE_CHARACTERS, _LONGEST_PIECE = 4_000_000, 20_000
_MEASURED_TOKENS = 16_384  # at least twice what any command measures on
_PROSE_TIMES = 4  # there is ten times as much code
_HELD_OUT_TOPICS, _HELD_OUT_MODULES = 8, 8


def library_text(base: BaseModel) -> tuple[list[str], list[str]]:
    """The standard library's texts to learn from, and others to watch the run on."""
    documents = read_documents()
    drawn = calibration_text(documents, base.encode, evaluation_tokens=_MEASURED_TOKENS).evaluation_documents
    prose = [document.text for document in documents if document.name not in drawn]
    random.Random(1).shuffle(prose)
    units = library_units()
    learned = [*_pieces([unit for unit in units if not unit.held_out])]
    watched = [*_pieces([unit for unit in units if unit.held_out])][:_HELD_OUT_MODULES]
    training = [*learned, *(prose[_HELD_OUT_TOPICS:] * _PROSE_TIMES)]
    random.Random(0).shuffle(training)
    return training, [*prose[:_HELD_OUT_TOPICS], *watched]


def _pieces(units: Sequence[Unit]) -> Iterator[str]:
    left = _MODULE_CHARACTERS
    for file in files_of(units):
        text = read_python(file)[:_LONGEST_PIECE]
        if text.strip() and left > 0:
            left -= len(text)
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="whose tokens: a checkpoint folder or GGUF file")
    parser.add_argument("folder", type=Path, help="to write to")
    given = parser.parse_args()
    path, folder = given.model, given.folder
    form = FORMS["gpu"]
    results = Results(folder)
    prepare_text(
        results.text, training_tokens=_TRAINING_TOKENS, held_out_tokens=form.held_out_tokens, packages=form.packages
    )
    with BaseModel(path) as base:
        experiment = Experiment(base, form, results, "cpu")
        print(experiment.prepare())
        save_json(folder / FLOPS_NAME, flops_per_token(training_runs(experiment), experiment))
        for run in training_runs(experiment):
            if run.target is not None and run.after is None:
                run.model(experiment)  # keeps its routers
        for name, texts in zip(("train", "held-out"), library_text(base), strict=True):
            target = folder / "library" / name
            target.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (target / "library.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{target}: {len(texts)} texts, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
