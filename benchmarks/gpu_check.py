"""Everything about engines that needs a GPU, in one command and one report.

    python -m benchmarks.gpu_check ARTEFACT [ARTEFACT …]

For every artefact (a folder that `dlo-export MODEL --trt` wrote; one per lowering, and a dense one to compare with):

* its engines are checked against their description, loaded and run;
* parity against ONNX Runtime on the artefact's model.onnx: decisions, logits under the same decisions, greedy tokens;
* layer by layer, the time of every routed MLP with all tokens active and with none: a skipped one must take no time;
* latency of prefill and decode against the share of skipped (token, layer) pairs.

Prints what it found, a table of latencies, and one JSON line. Exit codes: 0 everything holds; 1 something does not;
2 bad arguments; 3 an engine could not be built; 4 no GPU, driver or TensorRT. Engines that take decisions are built on
the spot, which takes as long as the export did.

Nobody has run this on a GPU yet. Without one it runs up to its first CUDA call and ends with 4; its parts are tested
with ONNX Runtime in the engines' place.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engines.gpu_engines import engine_subject, forced_engines
from benchmarks.engines.gpu_report import Findings, examine, print_findings
from dlo_export.checkpoints.errors import DloError, InputError
from dlo_export.exporter.exit_codes import exit_code, report_error
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.artefact.files import changes
from dlo_export.runtimes.bench import Workload
from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.tensorrt.device import Device
from dlo_export.runtimes.tensorrt.engine_check import obstacles
from dlo_export.runtimes.tensorrt.engines import load_engines
from dlo_export.runtimes.tensorrt.gpu import find_gpu


@dataclasses.dataclass(frozen=True)
class Artefact:
    """One to check.

    Attributes:
        name: For the report.
        folder: Where it is.
        engines: Its engines.
        plugin_library: libdlo_plugins.so to run them with.
    """

    name: str
    folder: Path
    engines: tuple[EngineRecord, ...]
    plugin_library: Path | None = None


def read_artefacts(folders: Sequence[Path], workload: Workload, plugin_library: Path | None = None) -> list[Artefact]:
    """Reads artefacts and compares their engines with their descriptions; no GPU needed.

    Args:
        folders: Of the artefacts.
        workload: What they are to run.
        plugin_library: libdlo_plugins.so, for those of the plugin lowering.

    Raises:
        InputError: A file was changed, an engine cannot run here or is too small for the workload, or two artefacts
            have the same name; with everything that is wrong.
        RuntimeInputError: A folder has no engines this version runs.
    """
    artefacts, problems = [], []
    for folder in map(Path.resolve, folders):
        engines = load_engines(folder)
        artefacts.append(Artefact(folder.name, folder, engines, plugin_library))
        problems += [f"{folder.name}: {change}" for change in changes(load_description(folder).files)]
        found = obstacles(engines, find_gpu().target, plugin_library)
        problems += [f"{folder.name}: {obstacle.reason}" for obstacle in found]
        problems += [f"{folder.name}: {reason}" for reason in _too_small(engines, workload)]
    names = [artefact.name for artefact in artefacts]
    problems += [
        f"{name}: is the name of {names.count(name)} artefacts" for name in set(names) if names.count(name) > 1
    ]
    if problems:
        raise InputError(
            "gpu_check: " + "; ".join(problems),
            hint="export again with --trt, or give --plugin-library, or a smaller workload",
        )
    return artefacts


def _too_small(engines: Sequence[EngineRecord], workload: Workload) -> list[str]:
    """What of a workload the engines of one artefact do not take."""
    wanted = {
        "--batch": (workload.batch, max(engine.max_batch for engine in engines), "--trt-max-batch"),
        "--prompt-tokens": (
            workload.prompt_tokens,
            max(engine.max_sequence for engine in engines),
            "--trt-max-sequence",
        ),
        "--prompt-tokens and --decode-tokens": (
            workload.prompt_tokens + workload.decode_tokens,
            engines[0].max_cache,
            "--trt-max-cache",
        ),
    }
    return [
        f"{name} {size}: it was exported with {option} {most}"
        for name, (size, most, option) in wanted.items()
        if size > most
    ]


def check(artefacts: Sequence[Artefact], workload: Workload) -> list[Findings]:
    """Checks artefacts one after the other. Needs a GPU.

    Raises:
        BackendUnavailableError: There is none.
    """
    device = Device()
    target = device.target
    device.close()
    reporter = Reporter(verbose=True)
    findings = []
    for artefact in artefacts:
        with tempfile.TemporaryDirectory() as work:
            routed = any(engine.lowering != "none" for engine in artefact.engines)
            library = artefact.plugin_library
            forced = forced_engines(artefact.engines, Path(work), target, reporter, library) if routed else None
            subject = engine_subject(artefact.name, artefact.folder, artefact.engines, forced, library)
            findings.append(examine(subject, workload))
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", type=Path, nargs="+", help="folders with engines")
    parser.add_argument("--plugin-library", type=Path, help="libdlo_plugins.so, for engines of the plugin lowering")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="blocks per skip rate")
    given = parser.parse_args(arguments)
    try:
        workload = Workload(given.batch, given.prompt_tokens, given.decode_tokens, given.rounds)
        artefacts = read_artefacts(given.artefacts, workload, given.plugin_library)
        for artefact in artefacts:
            for engine in artefact.engines:
                print(
                    f"{artefact.name}: {engine.file.name}, {engine.lowering}, {engine.dtype}, {engine.build.backend} "
                    f"{engine.build.version}, {', '.join(engine.build.targets) or 'portable'}: as described",
                    file=sys.stderr,
                )
        findings = check(artefacts, workload)
    except (DloError, RuntimeInputError) as err:
        report_error(err)
        return exit_code(err)
    settings = {
        "workload": dataclasses.asdict(workload),
        "backends": sorted({e.build.backend for a in artefacts for e in a.engines}),
    }
    print_findings("Latency of TensorRT engines against skip rate", findings, settings)
    return 0 if all(found.verdict == "PASS" for found in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
