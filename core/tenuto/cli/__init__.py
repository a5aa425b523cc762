"""The command `tenuto`. `program.py` declares it, and what its commands do is in `commands.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tenuto` with these arguments (else the command line's) and return its exit code.

    0: done. 2: bad input, one sentence on stderr. 130: interrupted by Ctrl-C.
    """
    import typer
    from typer.main import get_command

    from .program import program
    from .run import BAD

    try:
        code = get_command(program).main(argv, prog_name="tenuto", standalone_mode=False)
    except typer.TyperException as error:
        print(_complaint(error), file=sys.stderr)
        return BAD
    except SystemExit as error:  # of shell completion
        code = error.code
    return code if isinstance(code, int) else 0


def _complaint(error: Any) -> str:
    """One sentence on arguments that cannot be."""
    context, said = getattr(error, "ctx", None), error.format_message()
    param = getattr(error, "param", None)
    if param is not None and error.message:  # of a value, not that it is missing
        said = f"{'/'.join(param.opts)}: {error.message.removeprefix('Value error, ')}"
    path = "tenuto" if context is None else context.command_path
    said = " ".join(said.split()).rstrip(".")
    return f"{path}: {said} (see {path} --help)"
