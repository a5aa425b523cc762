"""`tenuto inspect --plot`: the plot shows what the file says, or there is one sentence."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import tenuto as tn
from tenuto import cli
from tenuto.artifact import contents, panels
from tenuto.artifact.contents import Band, Gaps, StepMap, band, gaps, step_map
from tenuto.artifact.panels import BLUE, COLOURS, PALE, REUSED, RUST, band_panel, gaps_panel
from tenuto.artifact.plots import figure, image, map_figure, plot
from tenuto.errors import TenutoError

STEPS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tiny_pixart_folder: Path) -> tn.Artifact:
    """Ranges a step, TIAR, and a route of random cells, of the tiny model."""
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(tiny_pixart_folder)
    pipe.set_progress_bar_config(disable=True)
    trajectory = tn.record(pipe, ["a red dog", "a blue cat"], steps=STEPS, guidance=2.0, batch=2)
    scheme = tn.schemes.W8A8_STATIC
    found = tn.quantize(pipe.transformer, scheme, trajectory, temporal="tiar")
    branches = [b.name for b in tn.describe(pipe.transformer).branches]
    table = torch.rand(STEPS, len(branches), generator=torch.Generator().manual_seed(3)) > 0.5
    table[0] = True
    times = list(trajectory.timesteps)
    found.header["route"] = {
        "policy": "by hand", "timesteps": times, "branches": branches,
        "reuse_ratio": 1 - float(table.float().mean()), "scores": {},
    }  # fmt: skip
    found.tensors["route/table"] = table
    return found


@pytest.fixture
def file(made: tn.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifact in a file, in a folder to work in."""
    made.save(tmp_path / "a.w8a8.safetensors")
    monkeypatch.chdir(tmp_path)
    return Path("a.w8a8.safetensors")


def less(artifact: tn.Artifact, *sections: str) -> tn.Artifact:
    """A copy without these sections."""
    found = copy.deepcopy(artifact)
    for name in sections:
        found.header.pop(name, None)
        found.tensors = {k: v for k, v in found.tensors.items() if not k.startswith(f"{name}/")}
    if "weights" in sections:
        found.header |= {"layers": {}, "schemes": {}}
    return found


def plotted(artifact: tn.Artifact, **options: Any) -> Any:
    """The figure, and a function from a panel's number and coordinates to the pixel there."""
    found = figure(artifact.header, artifact.tensors, "a.safetensors", **options)
    return found, image(found)


def pixel(picture: Any, axes: Any, x: float, y: float) -> str:
    """The colour of the image at a place in the coordinates of `axes`."""
    across, up = axes.transData.transform((x, y))
    return "#{:02x}{:02x}{:02x}".format(*picture.getpixel((int(across), int(picture.height - up))))


def words_of(found: Any) -> list[str]:
    """Every text of a figure or of its axes."""
    return [t.get_text() for t in found.findobj(Text) if t.get_text()]


def line_of(axes: Any, colour: str) -> tuple[list[float], list[float]]:
    """x and y of the one line of this colour."""
    (line,) = [line for line in axes.lines if line.get_color() == colour]
    return list(line.get_xdata()), list(line.get_ydata())


# --- the map --------------------------------------------------------------------------------------


def test_every_cell_has_the_colour_of_its_kind_or_of_reuse(made: tn.Artifact) -> None:
    (found, picture), route = plotted(made), step_map(made.header, made.tensors)
    assert route is not None
    kinds, axes = route.kinds(), found.axes[0]
    assert kinds[:3] == ["attention", "cross-attention", "feed-forward"]
    for step in range(STEPS):
        for branch, kind in enumerate(kinds):
            wanted = COLOURS[kind] if made.tensors["route/table"][step, branch] else REUSED
            for x, y in ((0, 0), (-0.45, -0.25), (0.45, 0.25)):
                assert pixel(picture, axes, step + x, branch + y) == wanted


def test_a_legend_says_what_the_colours_are(made: tn.Artifact) -> None:
    legend = plotted(made)[0].axes[0].get_legend()
    shown = {t.get_text(): to_hex(p.get_facecolor()) for t, p in
             zip(legend.get_texts(), legend.get_patches(), strict=True)}  # fmt: skip
    wanted = ("attention", "cross-attention", "feed-forward")
    assert shown == {kind: COLOURS[kind] for kind in wanted} | {"reuse": REUSED}


def test_rows_are_apart_and_blocks_farther(made: tn.Artifact) -> None:
    (found, picture), route = plotted(made), step_map(made.header, made.tensors)
    assert route is not None and route.blocks()[2:4] == [f"transformer_blocks.{i}" for i in (0, 1)]
    axes = found.axes[0]

    def between(row: int) -> int:
        """Pixels of paper, or nearly, below a row."""
        ends = (int(picture.height - axes.transData.transform((0, row + y))[1]) for y in (0, 1))
        column = int(axes.transData.transform((0, 0))[0])
        colours = [picture.getpixel((column, y)) for y in range(*ends)]
        return sum(min(colour) > 230 for colour in colours)

    assert between(2) > between(0) >= 1
    assert between(0) == between(1)


def test_steps_and_timesteps_are_at_their_columns(made: tn.Artifact) -> None:
    times = made.header["route"]["timesteps"]
    for axes in plotted(made)[0].axes:
        assert axes.get_xticks().tolist() == list(range(STEPS))
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == [f"{n}\n{t:.0f}" for n, t in enumerate(times, 1)]
        assert axes.get_xlim() == (-0.5, STEPS - 0.5)


def test_blocks_and_kinds_are_beside_their_rows(made: tn.Artifact) -> None:
    axes = plotted(made)[0].axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()][:3] == [
        "attention", "cross-attention", "feed-forward",
    ]  # fmt: skip
    heights = {t.get_text(): t.get_window_extent().y0 for t in axes.texts}
    row = -axes.transData.transform((0, 1))[1] + axes.transData.transform((0, 0))[1]
    assert heights["block 0"] - heights["block 1"] == pytest.approx(3 * row, abs=1)
    assert "Cache schedule, by hand: " in " ".join(heights)


def test_names_of_a_unet_are_put_plainly() -> None:
    resnet, inner = "down_blocks.0.resnets.1", "up_blocks.1.attentions.2.transformer_blocks"
    names = (resnet, f"{inner}.0.attn2", f"{inner}.3.ff", "mid_block.resnets.0", "layers.7.mlp")
    route = StepMap(torch.ones(1, 5, dtype=torch.bool), (9.0,), names, "x")
    assert [panels.words(block) for block in route.blocks()] == [
        "down 0, resnet 1", "up 1, attention 2", "up 1, attention 2, block 3", "mid, resnet 0",
        "layer 7",
    ]  # fmt: skip
    kinds = ["residual block", "cross-attention", "feed-forward", "residual block", "feed-forward"]
    assert route.kinds() == kinds


@pytest.mark.parametrize("steps, branches", [(1, 1), (50, 110), (1200, 40), (3, 2000)])
def test_many_cells_and_few(steps: int, branches: int) -> None:
    """Each has pixels of its own, and every word is inside the image."""
    names = tuple(f"blocks.{i // 2}.{('attn', 'mlp')[i % 2]}" for i in range(branches))
    table = torch.ones(steps, branches, dtype=torch.bool)
    table[-1, -1] = steps == 1
    route = StepMap(table, tuple(float(t) for t in range(steps, 0, -1)), names, "x" * 300)
    found = map_figure(route, "y" * 300, "z" * 300)
    picture = image(found)
    axes = found.axes[0]
    box = axes.get_window_extent()
    assert box.width >= steps - 0.01 and box.height >= 2 * branches - 0.01
    wanted = COLOURS["attention"] if steps == 1 else REUSED
    assert pixel(picture, axes, steps - 1, branches - 1) == wanted
    for text in found.findobj(Text):
        if text.get_text() and text.get_visible():
            place = text.get_window_extent()
            assert place.x0 >= 0 and place.x1 <= picture.width, text
            assert place.y0 >= 0 and place.y1 <= picture.height, text


def test_kinds_without_a_colour_of_their_own_get_one() -> None:
    """As far as colours and the legend go; the others are one."""
    kinds = ["_mix", "mlp", "conv", "gate", "a", "b", "c"]
    names = tuple(f"blocks.0.{kind}" for kind in kinds)
    route = StepMap(torch.ones(2, 7, dtype=torch.bool), (2.0, 1.0), names, "x")
    found = panels.kind_colours(route)
    assert found["feed-forward"] == COLOURS["feed-forward"] and found["b"] == panels.OTHER
    assert len({found[kind] for kind in ("_mix", "feed-forward", "conv", "gate")}) == 4
    legend = map_figure(route, "a", "b").axes[0].get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:2] == ["mix", "feed-forward"] and texts[-2:] == ["others", "reuse"]


def test_words_of_a_file_are_plain_text(made: tn.Artifact) -> None:
    """No formula, no control character, no warning of a letter that the font lacks."""
    found = copy.deepcopy(made)
    found.header["route"]["policy"] = "$\\frac{1}{0$ \x1b[2J\n\u202e\u72ac"
    found.header["model_class"] = "$x^{"
    branches = found.header["route"]["branches"]
    found.header["route"]["branches"] = [f"$\\bad.{name}" for name in branches]
    shown, picture = plotted(found)
    assert picture.width
    assert any(r"$\frac{1}{0$ \x1b[2J\n\u202e?" in text for text in words_of(shown))


# --- ranges and temporal errors -------------------------------------------------------------------


def test_the_layer_that_changes_most_is_shown(made: tn.Artifact) -> None:
    found = band(made.header, made.tensors)
    assert found is not None
    ranges = made.section("ranges")
    names = {k.rpartition(".")[0] for k in ranges}

    def ends(name: str) -> tuple[Any, Any]:
        scale, zero = ranges[f"{name}.scale"].double(), ranges[f"{name}.zero_point"].double()
        return -zero * scale, (255 - zero) * scale

    def change(name: str) -> float:
        low, high = ends(name)
        moved = low.max() - low.min() + high.max() - high.min()
        return float(moved / (high - low).mean())

    assert found.layer == max(sorted(names), key=change)
    assert f"of {len(names)} layers" in found.note
    other = min(names, key=change)
    asked = band(made.header, made.tensors, other)
    assert asked is not None and asked.layer == other
    assert torch.equal(asked.low, ends(other)[0]) and torch.equal(asked.high, ends(other)[1])
    assert other in " ".join(words_of(plotted(made, layer=other)[0]))


def test_the_band_lies_between_its_ends(made: tn.Artifact) -> None:
    found = band(made.header, made.tensors)
    shown, picture = plotted(less(made, "route", "temporal"))
    (axes,) = shown.axes
    assert found is not None
    low, high = found.low.tolist(), found.high.tolist()
    assert [list(line.get_ydata()) for line in axes.lines] == [high, low]
    for values in (low, high):
        for step, value in enumerate(values):
            assert pixel(picture, axes, step, value) == BLUE
    middle = (low[1] + high[1]) / 2 + 0.03 * (high[1] - low[1])
    assert pixel(picture, axes, 1, middle) == PALE
    bottom, top = axes.get_ylim()
    assert bottom < min(low) and max(high) < top
    assert found.layer in " ".join(words_of(axes)) and found.note in words_of(axes)


def test_temporal_errors_are_those_of_the_header(made: tn.Artifact) -> None:
    artifact = less(made, "route", "ranges")
    modules = artifact.header["temporal"]["modules"]
    (facts,) = modules.values()
    modules["another"] = facts | {"kind": "table", "cosine_error": [0.0] * STEPS}
    found = gaps(artifact.header)
    assert found is not None and found.note == "2 modules (1 tiar, 1 table)"
    assert found.worst.tolist() == facts["cosine_error"]
    assert found.mean.tolist() == pytest.approx([e / 2 for e in facts["cosine_error"]])
    shown, picture = plotted(artifact)
    (axes,) = shown.axes
    assert axes.get_yscale() == "log"
    for colour, values in ((BLUE, found.mean), (RUST, found.worst)):
        assert line_of(axes, colour) == (list(range(STEPS)), values.tolist())
        assert pixel(picture, axes, 0, float(values[0])) == colour
    del modules["another"]
    assert [line.get_color() for line in plotted(artifact)[0].axes[0].lines] == [BLUE]


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [-3.3, 4.1], [1e-9, 2e-9], [5.0, 5.0], [0.0], [-1e30, 1e38]]
)
def test_all_values_are_inside(values: list[float]) -> None:
    """In both panels of curves, whatever their size."""
    times, flat = tuple(map(float, range(len(values)))), torch.tensor(values, dtype=torch.float64)
    for height, fill in (
        band_panel(Band("x", flat, flat, times, "y")),
        gaps_panel(Gaps(flat.abs(), flat.abs(), times, "y")),
    ):
        shown = Figure()
        axes = shown.add_axes((0, 0, 1, 1))
        fill(axes)
        FigureCanvasAgg(shown).draw()
        bottom, top = axes.get_ylim()
        assert height > 0 and bottom < top
        for line in axes.lines:
            assert all(bottom < value < top for value in np.asarray(line.get_ydata()))


# --- what is not there ----------------------------------------------------------------------------


def test_sections_that_are_not_there_are_left_out(made: tn.Artifact) -> None:
    starts = {"route": "Cache schedule", "ranges": "Activation range", "temporal": "Temporal"}
    assert len(plotted(made)[0].axes) == 3
    for section, start in starts.items():
        shown = plotted(less(made, section))[0]
        assert len(shown.axes) == 2
        assert not [text for text in words_of(shown) if text.startswith(start)]
    with pytest.raises(TenutoError, match="nothing to plot in a"):
        plotted(less(made, *starts))


def test_one_range_for_all_steps_is_none_a_step(made: tn.Artifact) -> None:
    found = copy.deepcopy(made)
    found.tensors |= {k: v[:1] for k, v in made.tensors.items() if k.startswith("ranges/")}
    assert band(found.header, found.tensors) is None
    with pytest.raises(TenutoError, match="no activation range per step for the layer 'proj_out'"):
        band(found.header, found.tensors, "proj_out")


PROBE = """
import sys
if sys.argv[1] == "without":
    sys.modules["matplotlib"] = None  # as if it were not installed
from tenuto import cli
early = sys.modules.get("matplotlib")
code = cli.main(["inspect", sys.argv[2], "--plot"])
print(code, early, "matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("which", ["with", "without"])
def test_matplotlib_is_loaded_when_it_is_needed(file: Path, which: str) -> None:
    """Without it, one sentence says what to install, and nothing is written. pyplot never is."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, which, str(file)],
        env=os.environ | {"PYTHONPATH": str(Path(tn.__file__).parents[1])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = "tenuto: A plot needs matplotlib: pip install 'tenuto[plot]'.\n"
    assert run.stderr == ("" if which == "with" else said)
    assert run.stdout.splitlines()[-1] == f"{0 if which == 'with' else 2} None False"
    assert Path("a.w8a8.png").exists() == (which == "with")


def test_no_setting_of_matplotlib_is_changed(made: tn.Artifact) -> None:
    before = dict(matplotlib.rcParams)
    plotted(made)
    assert dict(matplotlib.rcParams) == before


# --- the command ----------------------------------------------------------------------------------


def test_the_picture_lies_beside_the_file(
    file: Path, made: tn.Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(file), "--plot"]) == 0
    out = capfd.readouterr().out
    assert "\nThe plot is in a.w8a8.png.\nNext: tenuto compare " in out and "by hand" in out
    with Image.open("a.w8a8.png") as picture:
        assert picture.tobytes() == plot(made.header, made.tensors, file.name).tobytes()
        assert json.loads(picture.info["tenuto"])["artifact"] == file.name
    assert {p.name for p in Path().iterdir()} == {file.name, "a.w8a8.png"}


def test_another_place_and_layer(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layer = "transformer_blocks.1.ff.net.2"
    command = ["inspect", str(file), "--plot", "deep/b.png", "--layer", layer, "--json"]
    assert cli.main(command) == 0
    assert json.loads(capfd.readouterr().out)["plot"] == str(Path("deep/b.png"))
    with Image.open("deep/b.png") as picture:
        assert json.loads(picture.info["tenuto"])["layer"] == layer


def bad_files(made: tn.Artifact) -> None:
    """What cannot be plotted, in the current folder."""
    bare = less(made, "route", "ranges", "temporal", "weights")
    bare.save("bare.safetensors")
    forged = copy.deepcopy(bare)
    forged.header["route"] = made.header["route"]
    for name, table in (("narrow", torch.ones(STEPS, 2)), ("flat", torch.ones(3))):
        forged.tensors["route/table"] = table.bool()
        forged.save(f"{name}.safetensors")
    wide = [f"blocks.{i}.attn" for i in range(contents.LIMIT + 1)]
    forged.header["route"] = forged.header["route"] | {"branches": wide}
    forged.tensors["route/table"] = torch.ones(STEPS, len(wide), dtype=torch.bool)
    forged.save("wide.safetensors")
    ranges = copy.deepcopy(bare)
    ranges.tensors |= {"ranges/x.scale": torch.tensor([1.0, 2.0, float("nan"), 4.0])}
    ranges.tensors |= {"ranges/x.zero_point": torch.zeros(STEPS)}
    ranges.save("nan.safetensors")
    ranges.tensors |= {"ranges/x.zero_point": torch.zeros(STEPS - 1)}
    ranges.save("odd.safetensors")
    errors = copy.deepcopy(bare)
    errors.header["temporal"] = {"modules": {"m": {"kind": "none", "cosine_error": [0.1] * 3}}}
    errors.save("short.safetensors")


BAD = {
    "nothing by step": (("bare.safetensors", "--plot"), "nothing to plot in bare.safetensors"),
    "a table too narrow": (("narrow.safetensors", "--plot"), "narrow.safetensors is damaged"),
    "a table of one row": (("flat.safetensors", "--plot"), "flat.safetensors is damaged"),
    "too many branches": (("wide.safetensors", "--plot"), "too large to plot"),
    "a range that is none": (("nan.safetensors", "--plot"), "nan.safetensors is damaged"),
    "ranges of two lengths": (("odd.safetensors", "--plot"), "odd.safetensors is damaged"),
    "errors of other steps": (("short.safetensors", "--plot"), "short.safetensors is damaged"),
    "no file": (("none.safetensors", "--plot"), "Cannot read none.safetensors"),
    "unknown layer": (("FILE", "--plot", "--layer", "head"), "for the layer 'head'"),
    "a layer and no plot": (("FILE", "--layer", "head"), "ask for --plot too"),
    "over the file itself": (("FILE", "--plot", "FILE"), "ends in .png"),
    "over another artifact": (("FILE", "--plot", "bare.safetensors"), "ends in .png"),
    "a folder": (("FILE", "--plot", "."), "ends in .png"),
    "not writable": (("FILE", "--plot", "/proc/none/a.png"), "Cannot write /proc/none/a.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_plotted_gets_one_sentence_and_leaves_no_file(
    name: str, file: Path, made: tn.Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    bad_files(made)
    before = {p: p.read_bytes() for p in sorted(Path().rglob("*"))}
    arguments, words = BAD[name]
    assert cli.main(["inspect", *(str(file) if a == "FILE" else a for a in arguments)]) == 2
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("tenuto: ")
    assert words in err
    assert {p: p.read_bytes() for p in sorted(Path().rglob("*"))} == before


def test_a_failed_write_leaves_no_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    assert cli.main(["inspect", str(file), "--plot"]) == 2
    assert "No space left" in capfd.readouterr().err
    assert [p.name for p in Path().iterdir()] == [file.name]
