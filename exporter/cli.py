"""The `dlo` and `dlo-export` commands: signals, streams and exit codes around what they do.

What they do is imported when all of that is in place: a signal may come at any moment, also during imports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from dlo_export.exporter.stop_signals import StopSignals


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `dlo`, ending with DESIGN's exit codes."""
    signals = StopSignals()
    code = 0
    try:
        with signals.raised():
            code = _run(list(sys.argv[1:] if arguments is None else arguments), signals)
    except KeyboardInterrupt:  # before or after `_run`
        pass
    sys.exit(code if signals.exit_code is None else signals.exit_code)


def export_main() -> NoReturn:
    """Runs `dlo-export`, which is `dlo export`."""
    main(["export", *sys.argv[1:]])


def _run(given: list[str], signals: StopSignals) -> int:
    from dlo_export.exporter.bus_errors import report_bus_errors  # noqa: PLC0415 - see above
    from dlo_export.exporter.deferred_imports import defer_imports  # noqa: PLC0415
    from dlo_export.exporter.exit_codes import BAD_INPUT, OUR_BUG, OUTPUT_LOST, exit_code, report_error  # noqa: PLC0415
    from dlo_export.exporter.standard_streams import is_stdout_gone, prepare_streams  # noqa: PLC0415

    prepare_streams()
    report_bus_errors()
    defer_imports()
    code = 0
    try:
        from dlo_export.exporter.app import app_for  # noqa: PLC0415

        app = app_for(given)
        code = app(given or ["--help"], prog_name="dlo", standalone_mode=False) or (0 if given else BAD_INPUT)
        sys.stdout.flush()
    except BaseException as error:
        # Libraries turn a KeyboardInterrupt into errors of their own, so what counts is that a signal came.
        if signals.exit_code is not None:
            report_error("interrupted")
        elif is_stdout_gone(error):
            code = OUTPUT_LOST
        else:
            code = exit_code(error)
            if code == OUR_BUG and {"-v", "--verbose"} & set(given):
                raise
            report_error(error)
    else:
        if signals.exit_code is not None:
            report_error("interrupted")
    return code
