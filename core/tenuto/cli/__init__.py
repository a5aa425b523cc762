"""The command `tenuto`. `program.py` declares it, and what its commands do is in `commands.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tenuto` with these arguments (else the command line's) and return its exit code.

    Without any it is the help, and a model without a command is checked: see `with_command`.
    0: done. 2: bad input, one sentence on stderr. 130: interrupted by Ctrl-C.
    """
    import typer
    from typer.main import get_command

    from .arguments import with_command
    from .program import program
    from .run import BAD

    command: Any = get_command(program)
    given = with_command(sys.argv[1:] if argv is None else argv, command.commands)
    try:
        code = command.main(given, prog_name="tenuto", standalone_mode=False)
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
