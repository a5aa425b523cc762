"""A layer is timed as it will run; what a card was fastest with is kept on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tenuto as tn
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.runtime import execution, mode
from tenuto.runtime.denoiser_call import CompiledBlocks
from tenuto.runtime.execution import DENSE, Chooser, chooser_for
from tenuto.runtime.kept_choices import KeptChoices
from tenuto.runtime.layers import QLinear
from tenuto.runtime.mode import CALLS, Mode
from tenuto.sampling.clock import Clock

MEASURED = Chooser.__call__  # a conftest makes it answer int8
CARD = torch.device("cuda", 0)
LAST = torch.device(
    "cuda", max(0, torch.cuda.device_count() - 1) if torch.cuda.is_available() else 1
)
GPU, CPU = ("QLinear", (64, 64), CARD), ("QLinear", (64, 64), torch.device("cpu"), 8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chooser, "__call__", MEASURED)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of every graph that torch.compile makes; they run through AOTAutograd."""
    torch._dynamo.reset()
    found: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        found.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(mode, "backend", lambda: keep)
    return found


def layer(chooser: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Linear(64, 32)
    weight = RoundToNearest().weight(base.weight, tn.schemes.W8A8.weight)
    return QLinear(base, weight, tn.schemes.W8A8, Clock((999,)), wanted="auto", chooser=chooser)


@pytest.mark.usefixtures("measured")
def test_compiled_layers_are_timed_compiled(graphs: list[str]) -> None:
    """Each way in one graph, with the activation before it; then the layer is as it says."""
    eager, compiled = Chooser(), Chooser(mode=Mode(compile=True))
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer(eager)(x)
        assert not graphs
        q = layer(compiled)
        found = q(x)
    assert len(graphs) == 2 and all("silu" in code for code in graphs)
    assert sum("int8_linear" in code for code in graphs) == 1
    name = DENSE if q.execution == DENSE else "int8_linear"
    assert list(compiled.known.values()) == [name]
    wanted = layer(lambda kind, runs: name)
    with torch.no_grad():
        assert torch.equal(found, wanted(x))
        layer(compiled)(x)
    assert len(graphs) == 2, "a layer that is alike is not timed again"
    torch._dynamo.reset()


@pytest.mark.usefixtures("measured")
def test_many_kinds_do_not_use_up_the_versions_of_one_code(graphs: list[str]) -> None:
    """Torch compiles one function only so many times, and then runs it in eager mode."""
    calls: list[Callable[[Tensor], Tensor]] = [lambda x, n=n: x * n for n in range(12)]
    with torch._dynamo.config.patch(recompile_limit=4):
        for call in calls:
            run = Mode(compile=True).run(call, torch.ones(3))
            run()
            run()
    assert len(graphs) == len(calls)
    torch._dynamo.reset()


def test_what_does_not_compile_is_timed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        def call(x: Tensor) -> Any:
            raise RuntimeError("there is no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    run = Mode(compile=True).run(lambda x: x + 1, torch.ones(2))
    assert torch.equal(run(), torch.full((2,), 2.0)) and run() is not None
    (line,) = caplog.messages
    assert "does not compile: there is no compiler." in line


@pytest.mark.parametrize("fails", [False, True])
def test_a_layer_is_captured_on_its_own_card(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All its calls in one graph; one that cannot be captured is timed as it is, with a word."""
    cards: list[torch.device] = []
    calls: list[Tensor] = []

    class Capture:
        def __init__(self, device: torch.device) -> None:
            cards.append(device)

        def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            if fails:
                raise RuntimeError("operation not permitted\nwhen the stream is capturing")
            call()
            return lambda: None, None

    monkeypatch.setattr("tenuto.runtime.mode.CudaCapture", Capture)
    with FakeTensorMode():
        x = torch.empty(2, device=LAST)
    run = Mode(capture=True).run(calls.append, x)
    run()
    run()
    assert cards == [LAST]
    assert len(calls) == 1 + CALLS * (2 if fails else 1), "made ready, and then captured or called"
    assert [line.partition(": ")[2] for line in caplog.messages] == (
        ["operation not permitted."] if fails else []
    )


def test_attach_asks_for_the_mode_that_it_makes(tiny: Any, monkeypatch: Any) -> None:
    """One chooser a mode for the whole process; the user's own is not exchanged."""
    asked: list[Any] = []

    def chosen(self: Chooser, kind: Any, runs: Any) -> str:
        asked.append(self)
        return "int8"

    monkeypatch.setattr(Chooser, "__call__", chosen)
    model = tiny("dit")
    own = Chooser()
    assert chooser_for(Mode()) is execution.process
    assert chooser_for(Mode(True)) is chooser_for(Mode(True)) is not execution.process
    x = torch.randn(2, 3, 8, 8)
    inputs = {"hidden_states": x, "timestep": torch.tensor([5, 5]),
              "class_labels": torch.tensor([1, 2])}  # fmt: skip
    for options, expected in (
        ({}, execution.process),
        ({"compile": True}, chooser_for(Mode(compile=True))),
        ({"compile": True, "chooser": own}, own),
    ):
        asked.clear()
        with (
            torch.no_grad(),
            tn.attach(model, tn.schemes.W8A8, graphs=False, **options) as attached,
        ):
            for patch in attached.patches:
                if isinstance(patch, CompiledBlocks):
                    patch.options = {"backend": "eager"}
            model(**inputs)
        assert asked and all(chooser is expected for chooser in asked)
    assert [str(Mode(*m)) for m in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        "eager", "compiled", "captured", "compiled and captured"
    ]  # fmt: skip


# --- on disk --------------------------------------------------------------------------------------


def timed(names: list[str]) -> dict[str, Callable[[], None]]:
    """Ways that count how often they run."""
    return {name: functools.partial(names.append, name) for name in ("fast", DENSE)}


@pytest.mark.usefixtures("measured")
def test_another_process_of_the_same_card_times_nothing(tmp_path: Path) -> None:
    """By card, mode and kind. What a CPU is fastest with depends on what else it does."""
    path, ran = tmp_path / "deep" / "choices.json", []
    first = Chooser(kept=KeptChoices(path))
    name = first(GPU, timed(ran))
    assert ran and path.exists() and [p.name for p in path.parent.iterdir()] == [path.name]
    ran.clear()
    second = (*GPU[:-1], LAST)  # another card of the same name
    for kind in (GPU, second):
        assert Chooser(kept=KeptChoices(path))(kind, timed(ran)) == name and not ran
    for other, kind in (
        (Chooser(mode=Mode(compile=True), kept=KeptChoices(path)), GPU),
        (Chooser(kept=KeptChoices(path)), (*GPU, "another kernel")),
        (Chooser(kept=KeptChoices(path)), CPU),
        (Chooser(), GPU),
    ):
        ran.clear()
        other(kind, timed(ran))
        assert ran, (other.mode, kind)
    ran.clear()
    Chooser(kept=KeptChoices(path))(CPU, timed(ran))
    assert ran, "that of a CPU is not kept"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "\x00\xff"])
def test_a_damaged_file_is_none(tmp_path: Path, content: str) -> None:
    """And so is one that names what there is no more; both are written anew."""
    path, ran = tmp_path / "choices.json", []
    path.write_text(content, encoding="utf-8")
    kept = KeptChoices(path)
    assert kept.get(Mode(), GPU, CARD) is None
    kept.add(Mode(), GPU, CARD, "a kernel of the past")
    name = Chooser(kept=kept)(GPU, timed(ran))
    assert ran and kept.get(Mode(), GPU, CARD) == name


def test_the_oldest_choice_goes_and_those_of_other_processes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read once, and again before it is written."""
    monkeypatch.setattr("tenuto.runtime.kept_choices.MOST", 3)
    path = tmp_path / "choices.json"
    ours, theirs = KeptChoices(path), KeptChoices(path)
    assert ours.get(Mode(), "a", CARD) is None
    theirs.add(Mode(), "a", CARD, "one")
    assert ours.get(Mode(), "a", CARD) is None, "a layer reads no file"
    for number, kind in enumerate("bcad"):
        ours.add(Mode(), kind, CARD, f"{number}")
        assert ours.get(Mode(), kind, CARD) == f"{number}"
    found = {kind: KeptChoices(path).get(Mode(), kind, CARD) for kind in "abcd"}
    assert found == {"a": "2", "b": None, "c": "1", "d": "3"}, "b is the oldest"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_kind_is_known_by_its_device(device: str) -> None:
    """And by the threads of a CPU; of a GPU they say nothing."""
    with FakeTensorMode():
        x = torch.empty(2, device=device)
    asked: list[Any] = []

    def chooser(kind: Any, runs: Any) -> str:
        asked.append(kind)
        return DENSE

    assert execution.decided(chooser, ("QLinear",), {None: lambda x: x}, x) is None
    threads = (torch.get_num_threads(),) if device == "cpu" else ()
    assert asked == [("QLinear", x.device, *threads)]
    card = execution.card_of(asked[0])
    assert card == (x.device if device == "cuda" else None)


def test_where_nothing_can_be_written_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the place of the folder, and no user's folder at all."""
    (tmp_path / "file").write_text("")
    kept = KeptChoices(tmp_path / "file" / "choices.json")
    kept.add(Mode(), GPU, CARD, "fast")
    assert kept.get(Mode(), GPU, CARD) is None

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    KeptChoices().add(Mode(), GPU, CARD, "fast")
    assert KeptChoices().get(Mode(), GPU, CARD) is None


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("kind", "seconds", "kept"), [(GPU, 1.1, False), (GPU, 1.01, True), (CPU, 1.1, True)]
)
def test_on_a_gpu_what_is_slower_is_left(
    kind: Any, seconds: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.1 times float's time: on a CPU the smaller weights are worth that."""

    class Time:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    time = Time()
    monkeypatch.setattr("tenuto.runtime.timing.time", time)

    def spend(seconds: float) -> None:
        time.now += seconds

    runs = {"kernel": lambda: spend(seconds), DENSE: lambda: spend(1.0)}
    assert (Chooser()(kind, runs) == "kernel") == kept
