"""The command line: ``spurge COMMAND``, the commands being those of :mod:`spurge.cli.parser`.

Exit codes: 0 done; 1 an internal failure, a rank that was lost, or a doctor that found something wrong; 2 a mistake of
the user; 130 Ctrl-C. Errors are one line on standard error; ``--debug`` adds the traceback. Of the ranks that torchrun
starts only the first writes, or the second where the first was lost. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from spurge.cli.parser import build_parser
from spurge.cli.wording import in_options
from spurge.engine.base.ranks import ProcessRank, RankError, RankLost
from spurge.engine.base.temporary import within

USER_MISTAKE, INTERNAL, INTERRUPTED = 2, 1, 130
#: How the package's own messages begin, and none of Python's: with the arguments that they are about.
_OWN_MESSAGE = re.compile(r"[\w-]+(\[.*?\])?(, [\w-]+)*: ")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; `argv` defaults to the process's own arguments."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, the version or its one-line error
        return stop.code if isinstance(stop.code, int) else USER_MISTAKE
    # Before torch is loaded. Threads that spin while they wait slow a busy machine six-fold; sleeping costs an idle one
    # nothing (measured with the demo's training on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = arguments.debug
    arguments.typed = list(sys.argv[1:] if argv is None else argv)
    with within(warnings.catch_warnings()):
        warnings.showwarning = partial(_warn, arguments.command)  # type: ignore[assignment]
        try:
            command = importlib.import_module(f"spurge.cli.{arguments.command}")
            code = int(command.run(arguments) or 0)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED, debug)
        except RankError as error:
            reporting_rank = 1 if isinstance(error, RankLost) and error.rank == 0 else 0
            return _fail(str(error), INTERNAL, debug, reporting_rank)
        except BrokenPipeError:  # the reader (head, less) went away: not worth a word
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return INTERNAL
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            return _fail(text, USER_MISTAKE, debug)
        except (ValueError, ModuleNotFoundError) as error:
            return _fail(in_options(str(error), arguments.command), USER_MISTAKE, debug)
        except Exception as error:
            if isinstance(error, TypeError) and _OWN_MESSAGE.match(str(error)):
                return _fail(in_options(str(error), arguments.command), USER_MISTAKE, debug)
            text = f"internal failure: {type(error).__name__}: {error}"
            return _fail(text if debug else f"{text} (--debug shows where)", INTERNAL, debug)


def _fail(text: str, code: int, debug: bool, reporting_rank: int = 0) -> int:
    if debug:
        traceback.print_exc()
    if ProcessRank.from_environment().rank == reporting_rank:
        print(f"spurge: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _warn(command: str, message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning meant for users, in one line; libraries' notes to developers are left out."""
    if issubclass(category, UserWarning) and ProcessRank.from_environment().rank == 0:
        text = in_options(" ".join(str(message).split()), command)
        print(f"spurge: warning: {text}", file=sys.stderr)
