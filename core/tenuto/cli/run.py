"""One command run: its answer on stdout, whatever is wrong as one sentence on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import SENTENCE, TenutoError
from ..text import printable
from .console import Answer, Bars

BAD, INTERRUPTED = 2, 130  # exit codes
RESUMES = ("quantize", "train_router", "text_encoder")
SHARED = "quantize"  # the command that several processes can do together


def run(name: str, given: Mapping[str, Any]) -> int:
    """Run a function of `commands.py`, print what it answers, and return the exit code.

    given: its arguments, and `as_json` where the command has --json.
    """
    options = dict(given)
    as_json = options.pop("as_json", False)
    try:
        answer = _answer(name, options)
    except KeyboardInterrupt:
        say(_stopped(options["out"] if name in RESUMES else None))
        return INTERRUPTED
    except TenutoError as error:
        if not getattr(error, "elsewhere", False):  # else another process says it
            say(" ".join(str(error).split()))
        return BAD
    except OSError as error:
        say(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return BAD
    except SafetensorError as error:  # a full disk, in its words
        say(f"{error}.")
        return BAD
    if answer is None:
        return 0
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer.data) if as_json else answer, flush=True)
    return answer.code


def say(text: str) -> None:
    """One line on stderr."""
    print(f"tenuto: {printable(text, SENTENCE)}", file=sys.stderr)


def _answer(name: str, options: dict[str, Any]) -> Answer | None:
    """What a command answers; None where another process says it.

    All that is printed meanwhile goes to stderr.
    """
    with _quiet():
        from ..sampling import launched, launched_size
        from . import commands
        from .calls import gathered

        if name != SHARED and launched_size() > 1:
            command = name.replace("_", "-")
            raise TenutoError(f"{command} runs in one process, and only {SHARED} in several.")
        with contextlib.redirect_stdout(sys.stderr), launched() as here:
            with Bars(sys.stderr if here.first else None) as bars:
                if name == SHARED:
                    _say_processes(here.size, bars)
                answer = getattr(commands, name)(**gathered(name, options), bars=bars)
            return answer if here.first else None


def _say_processes(size: int, bars: Bars) -> None:
    """How many processes there are, where a launcher was asked for several."""
    from ..sampling import started_alone

    if size > 1:
        bars.note(f"{size} processes share the work.")
    elif started_alone():
        bars.note(
            "accelerate has started one process, whatever --num_processes says: with --multi_gpu "
            "it starts as many, on a CPU too."
        )


def _stopped(out: Path | None) -> str:
    from .checks import work_folder

    if out is None:
        return "stopped; nothing was written."
    return f"stopped; the same command resumes, from {work_folder(out)}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other libraries' warnings stay away; what Tenuto says is left."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
