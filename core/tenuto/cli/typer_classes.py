"""Commands of typer whose help names no type in angle brackets, and one that reads two spellings.

Typer (0.29) writes `<bool>` beside a switch and `<str>` beside an argument: the type of what has no
`metavar`. An option of ours that takes a value has one, which says more.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup

from .arguments import spelled


def _without_types(params: list[Any]) -> list[Any]:
    """The same parameters, whose help shows their `metavar` or nothing."""
    for param in params:
        shown = None if isinstance(param, TyperArgument) else param.metavar
        param.display_type_rich = lambda ctx, shown=shown: shown
    return params


class Command(TyperCommand):
    """A command whose help names no types."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, with that of the help."""
        return _without_types(super().get_params(ctx))


class Group(TyperGroup):
    """The program, whose help names no types."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, with that of the help."""
        return _without_types(super().get_params(ctx))


class Loose(Command):
    """A command with `--plot [PNG]` or `--roots DIR...`: see `spelled`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments as typer would have them."""
        return super().parse_args(ctx, spelled(args, optional=("--plot",), many=("--roots",)))
