"""The experiments of the DLO and TLI papers (arXiv 2407.11030, 2410.11654) on one machine, in one command.

    python -m benchmarks.reproduce_papers --quick                      # a tiny model, within three minutes on two cores
    python -m benchmarks.reproduce_papers --form hour                  # SmolLM2-135M, an hour of two cores
    python -m benchmarks.reproduce_papers --form gpu --device cuda     # SmolLM2-135M, ten minutes of a large GPU

(a) loss right after a model was enlarged, by every method; (b) loss against tokens and FLOPs of fine-tuning; (c)
perplexity against active rate, of routers and of what skips as much without any; (d) perplexity and speed of exported
artefacts; (e) which layers and which tokens skip.

Every result is a JSON file in the output folder, and what is there is never repeated: the same command goes on where it
was stopped. Speed is measured first, whatever the budget; then the budget decides how many tokens each run gets, and
what does not fit is left out and named. Prints the tables and one JSON line. Exit codes: 0 done; 1 a method that must
keep the function does not; 2 bad arguments; 4 no such device. `benchmarks.gpu_training` runs the `gpu`
form in several processes at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.papers.forms import FORMS, with_values
from dlo_export.checkpoints.errors import DloError, InputError
from dlo_export.exporter.exit_codes import INTERRUPTED, exit_code, report_error


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="hour", choices=[*FORMS], help="how large everything is")
    parser.add_argument("--quick", action="store_true", help="the same as --form quick")
    parser.add_argument("--budget-s", type=float, help="seconds for everything; each form has its own")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of training and measuring")
    parser.add_argument("--model", type=Path, help="dense checkpoint to start from, in place of SmolLM2-135M")
    parser.add_argument("--data", type=Path, help=".jsonl chats to train on, in place of docstrings and functions")
    parser.add_argument("--tasks", type=Path, help="folder of log-likelihood tasks, as `dlo evaluate` reads them")
    parser.add_argument("--output", type=Path, help="folder of the results; .peers/papers-FORM by default")
    parser.add_argument("--publish", type=Path, help="folder to copy tables and plots to")
    parser.add_argument("--held-out-tokens", type=int, help="of each domain; each form has its own")
    parser.add_argument("--compile", action="store_true", help="compile layers in training, as `dlo train` does")
    parser.add_argument(
        "--only",
        choices=["expansion", "training", "exported", "shipped", "trained", "runs"],
        help="table (a); (b), (c) and (e); (d) untimed; (d); runs alone; some runs of another's plan",
    )
    parser.add_argument("--runs", nargs="+", default=(), help="of --only runs: which; it waits for the plan of another")
    parser.add_argument("--elsewhere", nargs="+", default=(), help="runs that other processes train, to wait for")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at once, this one included")
    parser.add_argument(
        "--speeds", type=float, nargs=2, metavar=("DENSE", "ROUTED"), help="tokens/s, measured before (training_rate)"
    )
    parser.add_argument(
        "--set", nargs="+", default=(), metavar="NAME=VALUE", help="other values of the form, as learning_rate=1e-4"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU")
    parsed = parser.parse_args(arguments)
    # Not at the top: processes that extract text import this file, and need none of PyTorch.
    import dlo_export.runtimes  # noqa: F401, PLC0415 - before torch: sets how its threads wait

    # isort: split
    import torch  # noqa: PLC0415

    from benchmarks.common.workspace import WORKSPACE  # noqa: PLC0415
    from benchmarks.papers.command import Request, check, reproduce  # noqa: PLC0415

    torch.set_num_threads(parsed.threads)
    name = "quick" if parsed.quick else parsed.form
    form = FORMS[name]
    form = dataclasses.replace(
        form,
        held_out_tokens=form.held_out_tokens if parsed.held_out_tokens is None else parsed.held_out_tokens,
        compile=parsed.compile,
    )
    try:
        form = with_values(form, parsed.set)
    except InputError as err:
        report_error(err)
        return exit_code(err)
    speeds = None if parsed.speeds is None else dict(zip(("dense", "routed"), parsed.speeds, strict=True))
    request = Request(
        output=parsed.output or WORKSPACE / f"papers-{name}",
        form=(name, form),
        started=started,
        budget_s=form.budget_s if parsed.budget_s is None else parsed.budget_s,
        device=parsed.device,
        model=parsed.model,
        data=parsed.data,
        tasks=parsed.tasks,
        publish=parsed.publish,
        only=parsed.only,
        runs=tuple(parsed.runs),
        elsewhere=tuple(parsed.elsewhere),
        workers=parsed.workers,
        speeds=speeds,
    )
    try:
        check(request)
        report = reproduce(request)
    except DloError as err:
        report_error(err)
        return exit_code(err)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps({"benchmark": "reproduce_papers", **report}), flush=True)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
