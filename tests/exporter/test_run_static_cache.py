"""`dlo run` on a cache that is not as long as what was asked for: told before the first token, not behind the last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.commands import run
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.exporter.forked_commands import run as dlo
from tests.runtimes.engine_records import record, save_artefact
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

SLOTS = 32


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With so many slots, of a model that has no token to end at."""
    folder = tmp_path_factory.mktemp("static")
    model = save_tiny_llama(folder / "model", hidden=64, head_dim=16, vocab=BYTE_VOCABULARY, tokenizer=True)
    export_model(ExportRequest(str(model), folder / "out", static_cache=SLOTS, parity=False), Reporter())
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / "out" / name).read_text())
        (folder / "out" / name).write_text(json.dumps({**values, "eos_token_id": None}))
    return folder / "out"


@pytest.mark.parametrize(("prompt", "most"), [(10, 23), (31, 2), (32, 1)])
def test_most_that_fits_is_generated_and_one_more_is_refused_before_a_token(
    artefact: Path, prompt: int, most: int, tmp_path: Path
) -> None:
    fits = dlo("run", artefact, "x" * prompt, "--raw", "-n", most)
    assert (fits.returncode, "warning" in fits.stderr) == (0, False), fits.stderr
    assert f"{most} new ones" in fits.stderr
    refused = dlo("run", artefact, "x" * prompt, "--raw", "-n", most + 1)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"a prompt of {prompt} tokens and {most + 1} new ones, its static cache holds {SLOTS}" in refused.stderr
    assert f"give -n {most} or less, or export with --static-cache {SLOTS + 1} or more" in refused.stderr


def test_what_fits_is_generated_with_a_warning_when_no_number_is_given(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(artefact, "x" * 10, raw=True)
    told = capsys.readouterr().err
    assert f"warning: the static cache holds {SLOTS} tokens, 10 of them the prompt's: 23 new ones at most" in told
    assert "23 new ones at " in told.splitlines()[-1]
    assert "beyond the model's context" not in told  # of 128: what is generated stays within


def test_prompt_is_refused_when_it_is_longer_than_the_cache(artefact: Path) -> None:
    with pytest.raises(InputError, match=f"the prompt has 33 tokens, its static cache holds {SLOTS}") as error:
        run.main(artefact, "x" * 33, raw=True)
    assert error.value.hint == "give a shorter prompt, or export with --static-cache 160 or more"


def test_engines_cache_counts_when_engines_are_run(artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artefact, tmp_path / "out")
    save_artefact(copy, record(copy, max_cache=64))
    with pytest.raises(InputError, match="a prompt of 60 tokens and 6 new ones, its static cache holds 64") as error:
        run.main(copy, "x" * 60, raw=True, max_new_tokens=6, trt=True)
    assert error.value.hint == "give -n 5 or less, or export with --trt-max-cache 65 or more"
