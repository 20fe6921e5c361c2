"""How ``python -m benchmarks.<name>`` ends when it is stopped or cannot go on: removed files, a line, an exit code.

Workers run in peers' environments too: nothing but the standard library is imported until there is an error to show.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

MACHINE, INTERRUPTED, TERMINATED = 4, 130, 143  # as of `dlo`
_HINT = "hint: `make venv` installs all that benchmarks need, but for benchmarks/requirements-papers.txt (plots)"


def end_in_words() -> None:
    """Takes over this process's ends, from here on.

    Terminations and hang-ups unwind it as Ctrl-C does, so that temporary folders are removed; what the shell had
    ignored (nohup) stays ignored. What reaches the top ends it

    * with 130 and no word: Ctrl-C, which the terminal shows;
    * with 4: a package that is not installed, by its name and a hint;
    * with the code and the words of `dlo`: what is the user's or the machine's to mend;
    * with 1 and a traceback: everything else.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)
    sys.excepthook = _end


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    if isinstance(error, ModuleNotFoundError) and error.name and _is_package_of_others(error.name):
        package = error.name.partition(".")[0]
        print(f"error: this benchmark needs {package}, which is not installed\n\n{_HINT}", file=sys.stderr)
        sys.exit(MACHINE)
    if "dlo_export" in sys.modules:
        from dlo_export.exporter.exit_codes import OUR_BUG, exit_code, report_error  # noqa: PLC0415 - see above

        if (code := exit_code(error)) != OUR_BUG:
            report_error(error)
            sys.exit(code)
    sys.__excepthook__(kind, error, trace)


def _is_package_of_others(name: str) -> bool:
    """Whether a module that was not found is another package's: what is missing of an installed one is a fault."""
    package, _, rest = name.partition(".")
    return not rest or package not in {"benchmarks", "dlo_export"}
