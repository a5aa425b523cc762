"""The command `tenuto`. What its commands do is in `commands.py`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from ..errors import SENTENCE, TenutoError
from ..text import printable
from ..version import __version__
from .arguments import real, text, whole

MODEL = "demo:transformer, demo:unet, a diffusers folder or a hub id"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tenuto` with these arguments (else the command line's) and return its exit code.

    0: done. 2: bad input, one sentence on stderr. 130: interrupted by Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as error:
        return int(error.code or 0)
    try:
        with _quiet():
            answer = _run(args)
    except KeyboardInterrupt:
        _say(_stopped(args))
        return INTERRUPTED
    except TenutoError as error:
        _say(" ".join(str(error).split()))
        return 2
    except OSError as error:
        _say(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 2
    except SafetensorError as error:  # a full disk, in its words
        _say(f"{error}.")
        return 2
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer.data) if args.json else answer.text, flush=True)
    return 0


def _say(text: str) -> None:
    print(f"tenuto: {printable(text, SENTENCE)}", file=sys.stderr)


def _stopped(args: argparse.Namespace) -> str:
    from .checks import work_folder

    if not args.resumes:
        return "stopped; nothing was written."
    return f"stopped; the same command resumes, from {work_folder(args.out)}."


def _run(args: argparse.Namespace) -> Any:
    from . import commands
    from .console import Bars

    with contextlib.redirect_stdout(sys.stderr), Bars(sys.stderr) as bars:
        return getattr(commands, args.function)(args, bars)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other libraries' warnings and bars stay away; what Tenuto says is left."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tenuto",
        description="Quantize a diffusion model, train a cache router for it, and measure both.",
        epilog="example: tenuto demo --out tenuto-demo",
    )
    parser.add_argument("--version", action="version", version=f"tenuto {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for add in (_demo, _quantize, _train_router, _generate, _compare, _inspect, _app):
        add(commands)
    return parser


def _command(commands: Any, name: str, about: str, example: str, resumes: bool = False) -> Any:
    found = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example: {example}",
    )
    found.set_defaults(function=name.replace("-", "_"), json=False, resumes=resumes)
    return found


def _sampling(parser: Any, seed: int = 0) -> None:
    """The options of every command that samples."""
    add = parser.add_argument
    add("--steps", type=whole(1), metavar="N", help="steps (the artifact's or model's, else 20)")
    add("--guidance", type=real(0, math.inf), metavar="G", help="guidance (artifact's or model's)")
    add("--seed", type=whole(0), default=seed, metavar="S", help="first seed (%(default)s)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")


def _execution(parser: Any, default: str) -> None:
    from ..runtime import EXECUTIONS

    parser.add_argument(
        "--execution",
        choices=EXECUTIONS,
        default=default,
        help="int8: the artifact's own arithmetic; float: its weights, inputs as they are; "
        "auto: by layer, whichever is not clearly slower here (%(default)s)",
    )


def _demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", "calibrate a model that ships and show what it does to eight pictures",
        "tenuto demo --model transformer --out tenuto-demo",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="transformer", metavar="NAME", help="transformer or unet (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tenuto-demo"),
        metavar="DIR",
        help="folder for demo.png and demo.json (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _quantize(commands: Any) -> None:
    parser = _command(
        commands, "quantize", "quantize a model and write one artifact",
        "tenuto quantize demo:transformer --scheme w8a8 --out demo.safetensors", resumes=True,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add(
        "--scheme",
        metavar="S",
        help="w8a8, w4a8, w8a16, w4a16; w8a8-static, w4a8-static: stored ranges, one a step",
    )
    add(
        "--text-encoder",
        metavar="W",
        help="w8 or w4: the text encoders' weights too, or alone where no --scheme is given",
    )
    add("--method", metavar="M", help="how they round: rtn, awq or gptq (gptq)")
    add(
        "--temporal",
        default="auto",
        metavar="T",
        help="time-only modules: none, tiar, table or auto (%(default)s)",
    )
    add(
        "--rounding",
        metavar="R",
        help="weights below 8 bits: nearest, gptq or adaround (gptq; thorough: adaround)",
    )
    _preset(parser)
    add("--prompts", type=Path, metavar="FILE", help="calibration prompts, one a line")
    _sampling(parser)
    add("--compact", action="store_true", help="a smaller file that needs the model at hand")
    add("--out", type=Path, required=True, metavar="FILE", help="the artifact")


def _train_router(commands: Any) -> None:
    parser = _command(
        commands, "train-router", "train a cache router, and put it beside what an artifact holds",
        "tenuto train-router demo:transformer --artifact a.safetensors --out b.safetensors",
        resumes=True,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--artifact", type=Path, metavar="FILE", help="the quantized model to train on"
    )
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--speedup",
        type=real(1, math.inf, True),
        metavar="X",
        help="how many times less work the denoiser does",
    )
    aim.add_argument(
        "--reuse", type=real(0, 1, True), metavar="R", help="share of branch calls to hold (0.3)"
    )
    _preset(parser)
    parser.add_argument(
        "--iterations", type=whole(1), metavar="N", help="training iterations (the preset's)"
    )
    _sampling(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new artifact")


def _preset(parser: Any) -> None:
    parser.add_argument(
        "--preset",
        default="quick",
        metavar="P",
        help="effort: quick, standard or thorough (%(default)s)",
    )


def _generate(commands: Any) -> None:
    parser = _command(
        commands, "generate", "draw pictures of a prompt, with an artifact or without",
        'tenuto generate demo:transformer --prompt "a golden retriever" --artifact a.safetensors',
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--prompt", type=text, required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--negative", metavar="TEXT", help="what to keep away from")
    parser.add_argument("--artifact", type=Path, metavar="FILE", help="draw with this artifact")
    _sampling(parser)
    _execution(parser, "auto")
    parser.add_argument(
        "--batch",
        type=whole(1),
        default=1,
        metavar="N",
        help="pictures, in one grid (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the picture, a PNG (named after the prompt)"
    )


def _compare(commands: Any) -> None:
    from ..measure import FIRST_SEED

    parser = _command(
        commands, "compare", "measure what an artifact costs and what it buys",
        "tenuto compare demo:transformer --artifact demo.safetensors --count 16 --json",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--artifact", type=Path, required=True, metavar="FILE", help="the artifact")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to draw, one a line")
    parser.add_argument(
        "--count", type=whole(1), default=64, metavar="N", help="pictures (%(default)s)"
    )
    _sampling(parser, FIRST_SEED)
    _execution(parser, "int8")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", "show what is in an artifact", "tenuto inspect demo.safetensors"
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="an artifact")
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=True,
        metavar="PNG",
        help="also plot it step by step, into PNG (FILE with the ending .png)",
    )
    parser.add_argument(
        "--layer", metavar="NAME", help="whose activation ranges to plot (those that change most)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _app(commands: Any) -> None:
    from .app import add_options

    add_options(
        _command(commands, "app", "open the app in a browser", "tenuto app --roots ~/models")
    )
