"""`dlo run` on a cache that is not as long as what was asked for: told before the first token, not behind the last."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.commands import bench, evaluate, parity, run
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.errors import BackendUnavailableError
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


_TABLES = SLOTS * 8 * 20  # bytes to compute cosines and sines in


@pytest.mark.parametrize("command", ["run", "bench", "evaluate", "parity", "export"])
def test_command_says_what_a_cache_takes_when_no_memory_holds_it(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    text, model = tmp_path / "text.txt", str(artefact.with_name("model"))
    text.write_text("Some words of a text that is long enough. " * 400)
    commands = {
        "run": lambda: run.main(artefact, "x" * 10, raw=True, max_new_tokens=2),
        "bench": lambda: bench.main([artefact], prompt_tokens=8, decode_tokens=2, rounds=1, text=text),
        "evaluate": lambda: evaluate.main(str(artefact), text=[text]),
        "parity": lambda: parity.main(artefact, model),
        "export": lambda: export_model(ExportRequest(model, tmp_path / "out", static_cache=SLOTS), Reporter()),
    }
    monkeypatch.setattr("dlo_export.runtimes.memory.available_memory", lambda: _TABLES)
    with pytest.raises(BackendUnavailableError) as error:
        commands[command]()
    said = rf"a KV cache of {SLOTS} slots for each of \d+ sequences takes 0\.\d MB, and 0\.0 MB of memory are free"
    assert re.search(said, error.value.message), error.value.message
    assert error.value.hint == "run fewer sequences at once, or export with a smaller --static-cache"
    assert error.value.exit_code == 4
    assert not [*tmp_path.glob("*out*")]


def test_export_says_what_its_tables_take_when_no_memory_holds_them(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = artefact.with_name("model")
    request = ExportRequest(str(model), tmp_path / "out", static_cache=SLOTS, parity=False)
    monkeypatch.setattr("dlo_export.runtimes.memory.available_memory", lambda: _TABLES - 1)
    with pytest.raises(BackendUnavailableError) as error:
        export_model(request, Reporter())
    said = f"{model}: --static-cache {SLOTS}: its tables of cosines and sines take 0.0 MB of memory to compute, and "
    assert error.value.message.startswith(said + "0.0 MB of memory are free; the cache takes 0.")
    assert (error.value.hint, error.value.exit_code) == ("choose fewer slots", 4)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr("dlo_export.runtimes.memory.available_memory", lambda: _TABLES)
    export_model(request, Reporter())
