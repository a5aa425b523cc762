"""`tenuto inspect --plot`: the picture shows what the file says, or there is one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tenuto as tn
from tenuto import cli
from tenuto.artifact import contents, drawing, plots
from tenuto.artifact.contents import StepMap, band, gaps, step_map
from tenuto.artifact.plots import COLOURS, HELD, cell, plot, row_tops
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


def drawn(artifact: tn.Artifact, **options: Any) -> Any:
    return plot(artifact.header, artifact.tensors, "a.safetensors", **options)


def middle(box: tuple[int, int, int, int], down: int = 0) -> tuple[int, int]:
    return (box[0] + box[2]) // 2, (box[1] + box[3]) // 2 + down


# --- the map --------------------------------------------------------------------------------------


def test_every_cell_has_the_colour_of_its_kind_or_is_held(made: tn.Artifact) -> None:
    picture, route = drawn(made), step_map(made.header, made.tensors)
    assert route is not None
    down = plots.title_panel("a", "b", 900).height
    tops, kinds = row_tops(route), route.kinds()
    assert kinds[:3] == ["attention", "cross-attention", "feed-forward"]
    for step in range(STEPS):
        for branch, kind in enumerate(kinds):
            box = cell(route, step, tops[branch])
            wanted = COLOURS[kind] if made.tensors["route/table"][step, branch] else HELD
            assert picture.getpixel(middle(box, down)) == wanted
            for corner in ((box[0], box[1]), (box[2], box[3])):
                assert picture.getpixel((corner[0], corner[1] + down)) == wanted


def test_rows_are_apart_and_blocks_farther(made: tn.Artifact) -> None:
    route = step_map(made.header, made.tensors)
    assert route is not None and route.blocks()[2:4] == [f"transformer_blocks.{i}" for i in (0, 1)]
    gaps = [b - a for a, b in zip(row_tops(route), row_tops(route)[1:], strict=False)]
    assert gaps[2] > gaps[0] == gaps[1] == gaps[-1]


def test_names_of_a_unet_are_put_plainly() -> None:
    resnet, inner = "down_blocks.0.resnets.1", "up_blocks.1.attentions.2.transformer_blocks"
    names = (resnet, f"{inner}.0.attn2", f"{inner}.3.ff", "mid_block.resnets.0", "layers.7.mlp")
    route = StepMap(torch.ones(1, 5, dtype=torch.bool), (9.0,), names, "x")
    assert [plots.words(block) for block in route.blocks()] == [
        "down 0, resnet 1", "up 1, attention 2", "up 1, attention 2, block 3", "mid, resnet 0",
        "layer 7",
    ]  # fmt: skip
    kinds = ["residual block", "cross-attention", "feed-forward", "residual block", "feed-forward"]
    assert route.kinds() == kinds


@pytest.mark.parametrize("steps, branches", [(1, 1), (50, 110), (1000, 400), (3, 4000)])
def test_many_cells_and_few(steps: int, branches: int) -> None:
    """Each has a place of its own inside the picture."""
    names = tuple(f"blocks.{i // 2}.{('attn', 'mlp')[i % 2]}" for i in range(branches))
    table = torch.ones(steps, branches, dtype=torch.bool)
    route = StepMap(table, tuple(float(t) for t in range(steps, 0, -1)), names, "x")
    panel, tops = plots.map_panel(route), row_tops(route)
    last = cell(route, steps - 1, tops[branches - 1])
    assert last[2] < panel.width and last[3] < tops[-1] < panel.height
    assert panel.getpixel(middle(last)) == COLOURS["attention" if branches == 1 else "feed-forward"]
    assert tops == sorted(set(tops))
    assert panel.width <= 1100 or steps > 800


# --- ranges and temporal errors -------------------------------------------------------------------


def test_the_layer_that_changes_most_is_drawn(made: tn.Artifact) -> None:
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
    assert drawn(made, layer=other).tobytes() != drawn(made).tobytes()


def test_the_band_lies_between_its_ends(made: tn.Artifact) -> None:
    found = band(made.header, made.tensors)
    assert found is not None
    panel = plots.band_panel(found)
    scale = drawing.Scale.over([*found.low.tolist(), *found.high.tolist()])
    for line in (found.low.tolist(), found.high.tolist()):
        for x, y in drawing.points(line, scale):
            assert panel.getpixel((int(x), int(y))) == plots.BLUE
    (x, top), (_, bottom) = (drawing.points(v.tolist(), scale)[1] for v in (found.high, found.low))
    inside = [panel.getpixel((int(x), y)) for y in range(int(top) + 5, int(bottom) - 5)]
    assert inside and plots.PALE in inside and set(inside) <= {plots.PALE, drawing.LINE}
    assert panel.getpixel((int(x), int(top) - 6)) in {drawing.LINE, (251, 251, 249)}


def test_temporal_errors_are_those_of_the_header(made: tn.Artifact) -> None:
    header = copy.deepcopy(made.header)
    modules = header["temporal"]["modules"]
    (facts,) = modules.values()
    modules["another"] = facts | {"kind": "table", "cosine_error": [0.0] * STEPS}
    found = gaps(header)
    assert found is not None and found.note == "2 modules (1 tiar, 1 table)"
    assert found.worst.tolist() == facts["cosine_error"]
    assert found.mean.tolist() == pytest.approx([e / 2 for e in facts["cosine_error"]])
    panel = plots.gaps_panel(found)
    scale = drawing.Scale.over([*found.mean.tolist(), *found.worst.tolist()], log=True)
    for colour, line in ((plots.BLUE, found.mean), (plots.RUST, found.worst)):
        x, y = drawing.points(line.tolist(), scale)[0]
        assert panel.getpixel((int(x), int(y))) == colour


def test_ticks_are_round_and_inside() -> None:
    for values in ([0.0, 1.0], [-3.3, 4.1], [1e-9, 2e-9], [5.0, 5.0], [0.0], [-1e30, 1e30]):
        scale = drawing.Scale.over(values)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 8 and all(scale.low <= t <= scale.high for t, _ in ticks)
        assert all(drawing.TOP < scale.y(v) < drawing.TOP + drawing.HEIGHT for v in values)
    powers = drawing.Scale.over([3e-9, 2e-4], log=True)
    assert [text for _, text in powers.ticks()][:2] == ["1e-9", "1e-7"]
    assert drawing.Scale.over([0.0, 0.0], log=True).ticks()


# --- what is not there ----------------------------------------------------------------------------


def test_sections_that_are_not_there_are_left_out(made: tn.Artifact) -> None:
    whole = drawn(made).height
    panels = [drawn(less(made, name)).height for name in ("route", "ranges", "temporal")]
    title = plots.title_panel("a", "b", 900).height
    assert sum(whole - height for height in panels) == whole - title
    with pytest.raises(TenutoError, match="nothing to draw in a"):
        drawn(less(made, "route", "ranges", "temporal"))


def test_one_range_for_all_steps_is_none_a_step(made: tn.Artifact) -> None:
    found = copy.deepcopy(made)
    found.tensors |= {k: v[:1] for k, v in made.tensors.items() if k.startswith("ranges/")}
    assert band(found.header, found.tensors) is None
    with pytest.raises(TenutoError, match="no activation range a step for the layer 'proj_out'"):
        band(found.header, found.tensors, "proj_out")


# --- the command ----------------------------------------------------------------------------------


def test_the_picture_lies_beside_the_file(
    file: Path, made: tn.Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(file), "--plot"]) == 0
    out = capfd.readouterr().out
    assert out.endswith("\nThe picture is in a.w8a8.png.\n") and "by hand" in out
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
    """What cannot be drawn, in the current folder."""
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
    "nothing by step": (("bare.safetensors", "--plot"), "nothing to draw in bare.safetensors"),
    "a table too narrow": (("narrow.safetensors", "--plot"), "narrow.safetensors is damaged"),
    "a table of one row": (("flat.safetensors", "--plot"), "flat.safetensors is damaged"),
    "too many branches": (("wide.safetensors", "--plot"), "too large to draw"),
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
def test_what_cannot_be_drawn_gets_one_sentence_and_leaves_no_file(
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
