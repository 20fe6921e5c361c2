"""Training on a GPU: tokens per second, the papers' experiments on SmolLM2-135M, and the demo's adapter.

    python -m benchmarks.gpu_training --model SMOLLM2.gguf --text TEXT [--tasks TASKS] --out DIR --budget-s 400

TEXT is what `benchmarks.training_payload` made, TASKS a folder of log-likelihood requests; either may be a .tar.xz.
Results are written as they come: DIR/training.jsonl has a row for each, DIR/papers.tar.xz all of them with tables and
plots, DIR/adapter.tar.xz the trained adapter, DIR/compiled.tar.xz what torch.compile made. Without a GPU it checks what
it was given and ends with 4.

    --only PART ...           rates, trials, papers, adapter; without it, all but trials
    --compile                 as `dlo train --compile`
    --compiled FILE           the compiled.tar.xz of an earlier run on such a card, which saves that time
    --workers N               processes that train at once, 1 to 4
    --speeds DENSE ROUTED     tokens/s, all processes together, to plan with where no rates are measured
    --set NAME=VALUE ...      other values of the experiments' form
    --trial "NAME=VALUE ..."  the same, for a trial of its own beside the others
    --adapter ADAPTER         calibrated routers that the demo's adapter starts from; none is trained without
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import io
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.evidence import Evidence, begin_time, run_part
from benchmarks.papers.claims import claims
from benchmarks.papers.forms import FORMS, with_values
from benchmarks.papers.report import heading, write_plots, write_tables
from benchmarks.papers.results import Results
from benchmarks.papers.run_names import SHIPPED
from benchmarks.papers.tasks import task_files
from benchmarks.papers.training import FLOPS_NAME
from benchmarks.training_rate import SIDES
from dlo_export.checkpoints.adapter.adapter import load_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.modeling.training.run_folder import DESCRIPTION_NAME

_REPOSITORY = Path(__file__).resolve().parent.parent
_DLO = (sys.executable, "-c", "from dlo_export.exporter.cli import main; raise SystemExit(main())")
_FORM = "gpu"
_BATCH = 32  # sequences of a step, of the rates
_OWN = ("train-original", "train-routed-0.80-seed-0")  # runs of the first process
_PARTS = ("rates", "trials", "papers", "adapter")
_FINISHING_S = 12.0  # behind the experiments, for the archive, plots and the end of everything
_PLOTS_S, _ENDING_S = 5.0, 3.0  # the last are for removing what was trained, a gigabyte and more
_TIMING_S = 45.0  # of artefacts, when nothing trains
_ADAPTER_S, _PACKING_S = 60.0, 6.0 + _ENDING_S
_RATES_S, _EAGER_S, _LAST_WORDS_S = 90.0, 30.0, 3.0
_TO_TRAIN = 0.75  # of the experiments' time; in the rest the first process measures what the others trained
_LARGEST_ARCHIVE = 15_000_000
_COMPILED = Path(tempfile.gettempdir()) / "dlo-compiled"  # files in there name each other, so it never moves
_OF_TRAINER = 0.9  # tokens per second of dlo train over those of transformers' Trainer on the dense model
_TARGET = 0.9  # of the demo, over all layers
# What a result says that a row can do without: the archive has it.
_LONG = ("curve", "settings", "domains", "watched", "active_by_layer", "skipped", "layers", "timings", "workload")


@dataclass
class Inputs:
    """What the part is given.

    Attributes:
        model: Checkpoint folder or .gguf.
        text: Folder with text/, tokens/ and library/, or an archive of one.
        tasks: Folder of log-likelihood requests, or an archive of one; None leaves them out.
        adapter: Folder of routers to start the demo's adapter from; None to train none.
        compile: Compile layers in training.
        workers: Processes that train at once, 1 to 4.
        only: Of `_PARTS`, which; none for all but trials.
        speeds: Tokens per second of the deepened model, dense and routed, where no rates are measured here.
        changes: Of the experiments' form, see `with_values`.
        trials: Of the same: each is tried on a few runs.
        compiled: What an earlier run brought of torch.compile.
        device: "cuda"; tests say "cpu".
    """

    model: Path
    text: Path
    tasks: Path | None = None
    adapter: Path | None = None
    compile: bool = False
    workers: int = 1
    only: Sequence[str] = ()
    speeds: Sequence[float] | None = None
    changes: Sequence[str] = ()
    trials: Sequence[str] = ()
    compiled: Path | None = None
    device: str = "cuda"

    def check(self) -> None:
        """Refuses what is not there or not what it is said to be.

        Raises:
            InputError: So.
        """
        given = filter(None, (self.model, self.text, self.tasks, self.adapter, self.compiled))
        missing = [path for path in given if not path.exists()]
        if missing:
            raise InputError(f"gpu_training: {missing[0]}: no such file or folder", hint="see --help")
        if self.adapter is not None:
            load_adapter(self.adapter)
        for words in (self.changes, *map(str.split, self.trials)):
            with_values(FORMS[_FORM], words)
        with tempfile.TemporaryDirectory() as folder:
            if self.tasks is not None:
                task_files(unpacked(self.tasks, Path(folder) / "tasks"))
            text = unpacked(self.text, Path(folder) / "text")
            if lacking := [name for name in ("text", "library") if not (text / name).is_dir()]:
                raise InputError(
                    f"{self.text}: has no folder {lacking[0]}", hint="python -m benchmarks.training_payload makes it"
                )


def unpacked(source: Path, folder: Path) -> Path:
    """The folder, or an archive's content in another one."""
    if source.is_dir():
        return source
    with tarfile.open(source) as archive:
        # Python has filters since 3.11.4, and asks for one since 3.12.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder


@dataclass
class Child:
    """A process of its own: what goes wrong in it costs its figures alone.

    Attributes:
        name: Of its log, in the folder of rows.
        command: Its words.
        log: Where its output goes.
        cores: It may run on; None for all.
    """

    name: str
    command: Sequence[str | Path]
    log: Path
    cores: set[int] | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Starts it, in a group of its own, so that it ends with whatever it started."""
        words = [str(word) for word in self.command]
        path = os.pathsep.join([str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                cwd=_REPOSITORY,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTHONUNBUFFERED": "1",
                    "TORCHINDUCTOR_CACHE_DIR": str(_COMPILED),
                    "TORCHINDUCTOR_COMPILE_THREADS": "4",  # each of several processes would take all cores
                },
            )
        atexit.register(self.end)  # a group of its own hears no Ctrl-C
        if self.cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self._process.pid, self.cores)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        assert self._process is not None, "it was started"
        return self._process.poll()

    def end(self) -> int:
        """Ends it if it still runs; its exit status."""
        assert self._process is not None, "it was started"
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def wait(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Waits until it has ended, or ends it.

        Args:
            seconds: It has.
            meanwhile: Called again and again.

        Returns:
            Whether it ended by itself, and well.
        """
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            meanwhile()
            time.sleep(0.3)
        in_time = self.poll() is not None
        return self.end() == 0 and in_time

    def complaint(self) -> str:
        """The end of what it said."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2500:]


def measure(inputs: Inputs, evidence: Evidence, smoke: bool) -> None:
    """All parts, those of most worth first; the rates alone on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        part = _Part(inputs, evidence, smoke, Path(folder))
        with evidence.guard("inputs"):
            part.prepare()
        chosen = inputs.only or [name for name in _PARTS if name != "trials"]
        trains_adapter = "adapter" in chosen and inputs.adapter is not None
        if "rates" in chosen:
            part.rates()
        if "trials" in chosen:
            part.trials(evidence.left - _FINISHING_S)
        if "papers" in chosen:
            part.papers(evidence.left - _FINISHING_S - _TIMING_S - (_ADAPTER_S if trains_adapter else 0))
        if trains_adapter and evidence.fits("adapter", 25):
            part.finish_adapter(part.start_adapter(), evidence.left - 5)
        if "papers" in chosen:
            part.finish_shipped(max(2.0, evidence.left - _PLOTS_S - _ENDING_S))
        if inputs.compile and evidence.fits("compiled code", _PACKING_S):
            part.keep_compiled()


class _Part:
    """The pieces, and what they share."""

    def __init__(self, inputs: Inputs, evidence: Evidence, smoke: bool, folder: Path) -> None:
        self._in, self._evidence, self._smoke, self._folder = inputs, evidence, smoke, folder
        self._form = "smoke" if smoke else _FORM
        self._results = folder / "papers"
        self._library = folder
        self._tasks: Path | None = None
        self._shipped: Child | None = None
        self._seen: set[str] = set()
        self._speeds = inputs.speeds

    def prepare(self) -> None:
        """Unpacks the text, and what was compiled before."""
        start = time.monotonic()
        self._text = unpacked(self._in.text, self._folder / "payload")
        self._tasks = None if self._in.tasks is None else unpacked(self._in.tasks, self._folder / "tasks")
        self._library = self._text / "library"
        self._copy_text(self._results)
        if self._in.compiled is not None:
            unpacked(self._in.compiled, _COMPILED)
        self._evidence.row("inputs", seconds=round(time.monotonic() - start, 1))

    def _copy_text(self, results: Path) -> None:
        for name in ("text", "tokens", "routers"):
            if (self._text / name).is_dir():
                shutil.copytree(self._text / name, results / name)
        if (self._text / FLOPS_NAME).is_file():
            shutil.copy(self._text / FLOPS_NAME, results)

    def rates(self) -> None:
        """Tokens per second of dlo train and of transformers' Trainer: processes get ready at once and time in turn.

        A row is written as soon as there is one, and whoever takes too long is ended: the others' rows stay. Steps that
        are not compiled come behind, if there is time.
        """
        until = time.monotonic() + min(_RATES_S, self._evidence.left - _LAST_WORDS_S)
        batch = ("--batch", 2 if self._in.device == "cpu" else _BATCH)
        children: list[Child] = []
        if self._in.compile:
            shared = ("--compile", "--turn", self._folder / "turn", "--of", len(SIDES), *batch)
            children = [
                self._start_rate(f"compiled-{number}", *shared, "--sides", side) for number, side in enumerate(SIDES)
            ]
            self._await_rates(children, until)
        if until - time.monotonic() > _EAGER_S:
            children.append(self._start_rate("eager", *batch))
            self._await_rates(children, until)
        for child in children:
            if child.end():
                self._evidence.row(child.name, passed=False, error=child.complaint())
        self._write_rates(children)
        self._compare_rates()
        self._pack()

    def _await_rates(self, children: Sequence[Child], until: float) -> None:
        while time.monotonic() < until and any(child.poll() is None for child in children):
            self._write_rates(children)
            time.sleep(0.2)

    def _write_rates(self, children: Sequence[Child]) -> None:
        for line in itertools.chain(*(_json_lines(child.log) for child in children)):
            if "side" in line and (words := json.dumps(line)) not in self._seen:
                self._seen.add(words)
                self._evidence.row("training rate", **line)

    def _compare_rates(self) -> None:
        rows = [row for row in self._evidence.rows if row["what"] == "training rate" and "side" in row]
        speeds = {(row["compile"], row["side"]): row["tokens_per_second"] for row in rows}
        for compiled, ours in itertools.product((False, True), SIDES[:2]):
            if {(compiled, ours), (compiled, SIDES[2])} <= speeds.keys():
                ratio = speeds[compiled, ours] / speeds[compiled, SIDES[2]]
                how = "compiled" if compiled else "eager"
                self._evidence.row(
                    f"{ours} against Trainer, {how}",
                    passed=ratio >= _OF_TRAINER,
                    ratio=round(ratio, 3),
                    bar=_OF_TRAINER,
                )
        known = [speeds.get((self._in.compile, side)) for side in (SIDES[1], SIDES[0])]
        if all(known):
            self._speeds = [float(speed) for speed in known if speed]

    def trials(self, budget: float) -> None:
        """Other values of the form, each on its few runs, all at once.

        Args:
            budget: Seconds they have.
        """
        with self._evidence.guard("trials"):
            folders = {words: self._folder / f"trial-{number}" for number, words in enumerate(self._in.trials)}
            children = []
            for words, folder in folders.items():
                folder.mkdir()
                self._copy_text(folder)
                command = [*self._command(folder, budget), "--only", "trained", "--threads", 4]
                children.append(self._child(folder.name, *command, "--set", *self._in.changes, *words.split()))

            def meanwhile() -> None:
                for words, folder in folders.items():
                    self._note(Results(folder), f"trial [{words}]: ")

            for child in children:
                if not child.wait(max(1.0, budget - child.seconds), meanwhile):
                    self._evidence.row(child.name, passed=False, error=child.complaint())
            meanwhile()

    def _command(self, results: Path, budget: float) -> list[Any]:
        words = ["-m", "benchmarks.reproduce_papers", "--form", self._form, "--device", self._in.device]
        words += ["--model", str(self._in.model), "--output", str(results), "--budget-s", f"{budget:.0f}"]
        words += ["--compile"] if self._in.compile else []
        return [*words, "--speeds", *map(str, self._speeds)] if self._speeds else words

    def _start_rate(self, name: str, *words: Any) -> Child:
        command: list[Any] = ["-m", "benchmarks.training_rate", "--device", self._in.device, "--dtype", "bf16"]
        if self._in.device == "cpu":
            command += ["--tiny", "--sequence", "64", "--steps", "2"]
        return self._child(f"rate-{name}", *command, *words)

    def papers(self, budget: float) -> None:
        """The experiments; artefacts are made on a few cores beside them, once the models are there.

        Args:
            budget: Seconds they have.
        """
        with self._evidence.guard("papers"):
            cores = sorted(os.sched_getaffinity(0))
            aside = set(cores[-6:]) if len(cores) >= 12 else None
            command = self._command(self._results, budget)
            command += [] if self._tasks is None else ["--tasks", str(self._tasks)]
            command += ["--set", *self._in.changes] if self._in.changes else []
            threads = len(cores) - len(aside or ())
            elsewhere = [name for names in self._shares() for name in names]
            shared = ["--elsewhere", *elsewhere, "--workers", self._in.workers] if elsewhere else []
            main = self._child(
                "papers",
                *(*command, "--only", "training", "--threads", threads, *shared),
                cores=set(cores) - aside if aside else None,
            )
            workers = self._start_workers(command, budget, set(cores) - (aside or set()))
            shipped: list[Child] = []

            def meanwhile() -> None:
                results = Results(self._results)
                self._note(results)
                if not shipped and all(name in results for name in SHIPPED):
                    options = ("--only", "exported", "--budget-s", "240", "--threads", len(aside or cores))
                    shipped.append(self._child("shipped", *command, *options, cores=aside))

            done = main.wait(budget + 3, meanwhile)
            meanwhile()
            for each in (main, *workers):
                if each.end() or not done:
                    self._evidence.row(each.name, passed=False, error=each.complaint())
            self._shipped = shipped[0] if shipped else None

    def _shares(self) -> list[list[str]]:
        """Runs of the processes beside the first one, which keeps those that it measures most on."""
        runs = with_values(FORMS[self._form], self._in.changes).runs
        given = [name for name in runs if name not in _OWN]
        others = self._in.workers - 1
        return [given[start::others] for start in range(others)]

    def _start_workers(self, command: Sequence[str], budget: float, cores: set[int]) -> list[Child]:
        options = ("--only", "runs", "--budget-s", f"{_TO_TRAIN * budget:.0f}", "--threads", 2)
        sharing = ("--workers", self._in.workers)
        return [
            self._child(f"worker-{number}", *command, *options, *sharing, "--runs", *names, cores=cores)
            for number, names in enumerate(self._shares())
        ]

    def finish_shipped(self, seconds: float) -> None:
        """Waits for artefacts, which need no GPU, and has them timed alone; then tables, plots and claims."""
        with self._evidence.guard("shipped"):
            until = time.monotonic() + seconds
            if self._shipped is not None:
                self._wait_for_artefacts(self._shipped, until)
                self._shipped = None
                command = [*self._command(self._results, 240), "--only", "shipped"]
                command += ["--set", *self._in.changes] if self._in.changes else []
                self._wait_for_artefacts(self._child("timed", *command), until)
            results = Results(self._results)
            self._note(results)
            for claim in claims(results):
                # A tiny model shows that the command works, and nothing about the methods.
                self._evidence.row(claim.what, passed=None if self._smoke else claim.passed, **claim.figures)
            self._report(results)

    def _wait_for_artefacts(self, child: Child, until: float) -> None:
        if not child.wait(max(1.0, until - time.monotonic()), lambda: self._note(Results(self._results), pack=False)):
            self._evidence.row(child.name, passed=False, error=child.complaint())

    def _report(self, results: Results) -> None:
        """Tables, at once, and packed; then plots, if there is time: those of earlier processes may be older."""
        form = (self._form, with_values(FORMS[self._form], self._in.changes))
        given, seconds = self._in, self._evidence.budget_s
        write_tables(results, heading(results, form, model=given.model.name, device=given.device, budget_s=seconds))
        self._pack()
        if self._evidence.fits("plots", _PLOTS_S):
            write_plots(results)
            self._pack()

    def _note(self, results: Results, prefix: str = "papers: ", *, pack: bool = True) -> None:
        """Rows of results that are new, and the archive with them: whoever ends this has all that there was."""
        before = len(self._seen)
        for name, values in results.found("").items():
            if prefix + name not in self._seen:
                self._seen.add(prefix + name)
                self._evidence.row(prefix + name, **{key: value for key, value in values.items() if key not in _LONG})
        if pack and len(self._seen) > before:
            self._pack()

    def _pack(self) -> None:
        kept = [self._results / name for name in ("runs", "left-out", "plots", "papers.md", "reproduction.json")]
        _archive(self._evidence.out / "papers.tar.xz", [path for path in kept if path.exists()])
        logs = sorted(self._folder.glob("*.log"))
        _archive(self._evidence.out / "logs.tar.xz", logs)

    def keep_compiled(self) -> None:
        """Packs what torch.compile made, for the next run."""
        with self._evidence.guard("compiled code"):
            packed = self._evidence.out / "compiled.tar.xz"
            _archive(packed, sorted(_COMPILED.iterdir()), effort=1)
            size = packed.stat().st_size
            self._evidence.row("compiled code", bytes=size, too_large=size > _LARGEST_ARCHIVE)

    def start_adapter(self) -> Child:
        """Routers and LoRA for the demo: distilled from the dense model on the standard library's text alone."""
        assert self._in.adapter is not None, "there is something to start from"
        start = load_adapter(self._in.adapter)
        routed = len(start.routed_layers)
        target = 1 - (1 - _TARGET) * start.num_layers / routed  # training's counts the layers with routers
        steps, batch, sequence = (120, 32, 512) if self._in.device == "cuda" and not self._smoke else (6, 4, 256)
        out = self._folder / "adapter"
        return self._child(
            "adapter",
            *("train", self._in.model, "--adapter", self._in.adapter, "-o", out, "--as-adapter", "--mode", "lora"),
            *("--lora-rank", 3, "--data", self._library / "train", "--held-out", self._library / "held-out"),
            *("--target", f"{target:.4f}", "--anneal-steps", 0, "--selection", "threshold", "--skip-weight", 0.1),
            *("--language-weight", 0, "--distill-weight", 1, "--learning-rate", 1e-3, "--max-steps", steps),
            *("--router-learning-rate", 0.02, "--relative-router-rate"),
            *("--batch", batch, "--sequence", sequence, "--eval-every", 40, "--save-every", 1000, "--json"),
            *("--dtype", "bf16", "--device", self._in.device, "--force-base"),
            dlo=True,
        )

    def finish_adapter(self, child: Child, seconds: float) -> None:
        """Waits for it and packs it."""
        with self._evidence.guard("adapter"):
            self._pack_adapter(child, seconds)

    def _pack_adapter(self, child: Child, seconds: float) -> None:
        out = self._folder / "adapter"
        if not child.wait(seconds):
            self._evidence.row("adapter", passed=False, error=child.complaint())
            return
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        _archive(self._evidence.out / "adapter.tar.xz", [out, out.with_name("adapter.run") / "log.jsonl"])
        report = read_json(out / DESCRIPTION_NAME)["result"]
        self._evidence.row("adapter", passed=size < 2_000_000, bytes=size, seconds=round(child.seconds, 1), **report)

    def _child(self, name: str, *words: Any, cores: set[int] | None = None, dlo: bool = False) -> Child:
        start = _DLO if dlo else (sys.executable,)
        child = Child(name, [*start, *words], self._folder / f"{name}.log", cores)
        child.start()
        return child


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if line.startswith('{"benchmark"') and line.endswith("\n"):
            yield json.loads(line)


def _archive(file: Path, paths: Sequence[Path], *, effort: int = 6) -> None:
    """Packs files and folders, whole or not at all."""
    partial = io.BytesIO()
    with lzma.LZMAFile(partial, "w", preset=effort) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for path in paths:
            archive.add(path, path.name)
    temporary = file.with_suffix(".partial")
    temporary.write_bytes(partial.getvalue())
    os.replace(temporary, file)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("model", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("tasks", "adapter", "compiled"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=())
    parser.add_argument("--speeds", type=float, nargs=2)
    parser.add_argument("--set", nargs="+", default=(), dest="changes")
    parser.add_argument("--trial", action="append", default=[], dest="trials")
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2, 3, 4))
    begun = begin_time(arguments)
    asks_for_help = not {"-h", "--help"}.isdisjoint(sys.argv[1:] if arguments is None else arguments)
    parsed, others = (None, ["--help"]) if asks_for_help else parser.parse_known_args(arguments)
    inputs = Inputs(**vars(parsed)) if parsed is not None else Inputs(Path(), Path())
    return run_part("training", __doc__, inputs.check, functools.partial(measure, inputs), others, begun=begun)


if __name__ == "__main__":
    sys.exit(main())
