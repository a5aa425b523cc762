"""One list of cases for every adapter. docs/hosts.md shows it as a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.artifact import Artifact
from tenuto.errors import ArtifactError
from tenuto.model import describe

LONG = tuple(range(999, 0, -90))  # 12 steps: runs of fewer than nine reuse nothing


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


class Stop(BaseException):
    """What a host raises when its user stops it."""


def stop_at(number: int, error: Any = Stop) -> Any:
    def on_step(step: int) -> None:
        if step == number:
            raise error

    return on_step


def test_off_is_off(bench: Any, made: Any, bits: Any) -> None:
    """A run, a second one, off: the image and every bit of the model are what they were."""
    handle = bench.fresh()
    plain, before = bench.run(handle, made.run()), bits(bench.host.denoiser(handle))
    with bench.on(handle, made) as attached:
        changed = bench.run(attached.handle, made.run())
        assert torch.equal(bench.run(attached.handle, made.run()), changed)
    assert bits(bench.host.denoiser(handle)) == before
    assert torch.equal(bench.run(handle, made.run()), plain)
    assert not torch.equal(changed, plain), "it was not even on"
    attached.detach()
    assert bits(bench.host.denoiser(handle)) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_off_after_an_interrupt(bench: Any, some: Any, bits: Any, error: Any) -> None:
    """In mid-run; the next run is as if nothing had been, and so is the model afterwards."""
    handle = bench.fresh()
    plain, before = bench.run(handle, some.run()), bits(bench.host.denoiser(handle))
    with bench.on(handle, some) as attached:
        expected = bench.run(attached.handle, some.run())
        with pytest.raises(error):
            bench.run(attached.handle, some.run(on_step=stop_at(some.middle, error)))
        assert torch.equal(bench.run(attached.handle, some.run()), expected)
        with pytest.raises(error):
            bench.run(attached.handle, some.run(on_step=stop_at(some.middle, error)))
    assert bits(bench.host.denoiser(handle)) == before
    assert torch.equal(bench.run(handle, some.run()), plain)


def test_off_after_an_error_deep_inside(bench: Any, some: Any, bits: Any) -> None:
    handle = bench.fresh()
    denoiser = bench.host.denoiser(handle)
    plain, before = bench.run(handle, some.run()), bits(denoiser)
    norms = torch.nn.LayerNorm, torch.nn.GroupNorm
    names = [n for n, m in denoiser.named_modules() if isinstance(m, norms)]
    calls: list[int] = []

    def trap(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop), bench.on(handle, some) as attached:
        hook = denoiser.get_submodule(names[-1]).register_forward_pre_hook(trap)
        try:
            bench.run(attached.handle, some.run())
        finally:
            hook.remove()
    assert bits(denoiser) == before
    assert torch.equal(bench.run(handle, some.run()), plain)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_all_compute_is_exact(bench: Any, artifact: Any, settings: Any, sampler: str) -> None:
    handle, how = bench.fresh(), settings(sampler=sampler)
    plain = bench.run(handle, how)
    with bench.on(handle, artifact(bench.family, None, 1.1)) as attached:
        assert torch.equal(bench.run(attached.handle, how), plain)
        assert sum(held for _, held in bench.counts(attached).values()) == 0


def test_the_table_is_what_is_reused(bench: Any, artifact: Any, settings: Any) -> None:
    """Cell by cell: as many computed and held as the route says, and the same ones."""
    handle, made = bench.fresh(), artifact(bench.family)
    with bench.on(handle, made) as attached:
        bench.run(attached.handle, settings())
        counts = bench.counts(attached)
    table = made.tensors["route/table"]
    for name, column in zip(made.header["route"]["branches"], table.t(), strict=True):
        if not bool(column.all()):
            assert counts[name] == [int(column.sum()), int((~column).sum())], name


def test_whole_calls_are_reused(bench: Any, artifact: Any, settings: Any) -> None:
    """A route of the whole call: what it does not compute does not run at all."""
    handle, made = bench.fresh(), artifact(bench.family, None)
    rows = torch.tensor([True, False] * len(made.header["route"]["timesteps"]))[:, None]
    rows = rows[: len(made.header["route"]["timesteps"])]
    route = made.header["route"] | {"branches": [""]}
    made = Artifact(made.header | {"route": route}, {"route/table": rows})
    plain, calls = bench.run(handle, settings()), []
    block = describe(bench.host.denoiser(handle)).blocks[0]
    with bench.on(handle, made) as attached:
        module = bench.host.denoiser(attached.handle).get_submodule(block)
        hook = module.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            found = bench.run(attached.handle, settings())
        finally:
            hook.remove()
        assert bench.counts(attached) == {"": [int(rows.sum()), int((~rows).sum())]}
    assert len(calls) == int(rows.sum()) and not torch.equal(found, plain)
    assert torch.equal(bench.run(handle, settings()), plain)


def test_batched_equals_split(bench: Any, made: Any) -> None:
    """The halves of guidance in one call or in two, whichever first: sums alone differ."""
    handle = bench.fresh()
    noise = gap(bench.run(handle, made.run(split=True)), bench.run(handle, made.run()))
    with bench.on(handle, made) as attached:
        together = bench.run(attached.handle, made.run())
        apart = bench.run(attached.handle, made.run(split=True))
    quantized = bool(made.artifact.section("weights"))
    assert noise < 1e-5
    assert gap(apart, together) < (2e-2 if quantized else 1e-5 + 4 * noise)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_second_order_samplers(bench: Any, some: Any, sampler: str) -> None:
    """Several evaluations a step: some are reused, a second run is the same, and it is finite."""
    handle, how = bench.fresh(), some.run(sampler=sampler)
    plain = bench.run(handle, how)
    with bench.on(handle, some) as attached:
        found = bench.run(attached.handle, how)
        reused = sum(held for _, held in bench.counts(attached).values())
        assert torch.equal(bench.run(attached.handle, how), found)
    own = bench.kind == "diffusers" and sampler == "dpm_2" and some.options  # its own timesteps
    assert torch.isfinite(found).all() and (own or reused > 0)
    assert torch.equal(found, plain) == (reused == 0 and not some.artifact.section("weights"))


def test_runs_are_isolated(bench: Any, made: Any) -> None:
    """Another size, batch, seed and step count in between: each run is what it is alone."""
    many = {
        "usual": made.run(), "pictures": made.run(batch=3, seed=5), "larger": made.run(
            size=bench.size + 4), "steps": made.run(times=(999, 850, 700, 550, 400, 250, 100)),
    }  # fmt: skip
    alone = {}
    for name, how in many.items():
        handle = bench.fresh()
        with bench.on(handle, made) as attached:
            alone[name] = bench.run(attached.handle, how)
    handle = bench.fresh()
    with bench.on(handle, made) as attached:
        for name in (*many, "usual", "larger", "pictures"):
            assert torch.equal(bench.run(attached.handle, many[name]), alone[name]), name


@pytest.mark.parametrize("start", [1, 11])
def test_partial_denoising(bench: Any, eager: Any, start: int) -> None:
    """A start in mid-schedule (image to image): its first step computes whatever the route says."""
    handle, how = bench.fresh(), eager.run(start=start, times=LONG)
    plain = bench.run(handle, how)
    with bench.on(handle, eager) as attached:
        bench.run(attached.handle, eager.run(times=LONG))
        found = bench.run(attached.handle, how)
        assert torch.equal(bench.run(attached.handle, how), found)
    if start == 11:
        assert torch.equal(found, plain), "with one step there is nothing to reuse"
    elif bench.tells or not eager.options:
        assert not torch.equal(found, plain)


def test_nested_runs(bench: Any, eager: Any) -> None:
    """A run inside a step of another: neither takes the other's features."""
    handle, found = bench.fresh(), list[Tensor]()
    inner = eager.run(seed=3)

    def nest(step: int) -> None:
        if step == eager.middle:
            found.append(bench.run(attached.handle, inner))
            if bench.kind == "comfy":  # it forgets the outer run's MODEL, with or without us
                attached.handle.pre_run()

    with bench.on(handle, eager) as attached:
        alone, plain = bench.run(attached.handle, inner), bench.run(attached.handle, eager.run())
        outer = bench.run(attached.handle, eager.run(on_step=nest))
        again = bench.run(attached.handle, eager.run(on_step=nest))
        assert torch.equal(bench.run(attached.handle, eager.run()), plain)
    assert all(torch.equal(picture, alone) for picture in found) and len(found) == 2
    assert torch.equal(outer, again)
    if bench.kind == "comfy":  # its runs have a beginning and an end, so the outer one goes on
        assert torch.equal(outer, plain)


def test_clones_are_apart(bench: Any, made: Any) -> None:
    """One handle with it, one without, in turn and in any order."""
    handle = bench.fresh()
    other = bench.clone(handle)
    plain = bench.run(other, made.run())
    with bench.on(handle, made) as attached:
        changed = bench.run(attached.handle, made.run())
        assert torch.equal(bench.run(other, made.run()), plain)
        assert torch.equal(bench.run(attached.handle, made.run()), changed)
        twin = bench.clone(attached.handle)
        assert torch.equal(bench.run(twin, made.run()), changed)
        assert torch.equal(bench.run(other, made.run(seed=4)), bench.run(other, made.run(seed=4)))
    assert torch.equal(bench.run(other, made.run()), plain)


def test_another_models_artifact_is_refused(
    bench: Any, artifact: Any, settings: Any, bits: Any
) -> None:
    handle = bench.fresh()
    before = bits(bench.host.denoiser(handle))
    wrong = "unet" if bench.family != "unet" else "pixart"
    with pytest.raises(ArtifactError), bench.on(handle, artifact(wrong)):
        pass
    assert bits(bench.host.denoiser(handle)) == before


def test_the_clock_follows(bench: Any, artifact: Any, settings: Any) -> None:
    """The steps in order, each half of guidance a stream of its own."""
    from tenuto.model import override_

    handle, rows = bench.fresh(), []
    with bench.on(handle, artifact(bench.family)) as attached:
        clock = bench.clock(attached)

        def note(original: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            rows.append((clock.step, len(set(clock.streams)), clock.exact))
            return original(*args, **kwargs)

        patch = override_(bench.host.denoiser(handle), note)
        bench.run(attached.handle, settings())
        patch.retire()
    assert rows == [(row, 2, True) for row in range(4)]


@contextmanager
def merged(denoiser: torch.nn.Module) -> Iterator[None]:
    """A low-rank update in every Linear's weight, as a merged LoRA is; gone afterwards."""
    layers = [m for m in denoiser.modules() if isinstance(m, torch.nn.Linear)]
    own, draw = [m.weight.detach().clone() for m in layers], torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer, weight in zip(layers, own, strict=True):
            up, down = (torch.randn(n, 2, generator=draw) for n in weight.shape)
            layer.weight.add_(0.1 * up @ down.T)
        yield
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.copy_(weight)


def test_lora_before_and_after(bench: Any, artifact: Any, settings: Any, bits: Any) -> None:
    """By the host's own loader: as strong as in full precision, in either order, and gone again.

    A bare denoiser has no loader: what is merged into its weights makes another model of it.
    """
    handle, made = bench.fresh(), artifact(bench.family)
    denoiser = bench.host.denoiser(handle)
    if bench.kind != "comfy":
        refused = pytest.raises(ArtifactError, match="another model")
        with merged(denoiser), refused, bench.on(handle, made):
            pass
        with bench.on(handle, made):
            return
    from comfy import weight_adapter

    layers = [n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    name = next(n for n in layers if n.endswith(("to_q", "attn.proj", "img_attn.proj")))
    rows, columns = denoiser.get_submodule(name).weight.shape
    draw = torch.Generator().manual_seed(2)
    up, down = (torch.randn(s, generator=draw) for s in ((rows, 2), (2, columns)))
    factors = (up * 0.3, down * 0.3, 2.0, None, None, None)
    patch = {f"diffusion_model.{name}.weight": weight_adapter.LoRAAdapter(set(), factors)}

    def with_lora(model: Any) -> Any:
        found = model.clone()
        assert found.add_patches(patch, 1.0) == list(patch)
        return found

    plain, full = bench.run(handle, settings()), bench.run(with_lora(handle), settings())
    with bench.on(handle, made) as attached:
        quantized = bench.run(attached.handle, settings())
        after = bench.run(with_lora(attached.handle), settings())
        assert torch.equal(bench.run(attached.handle, settings()), quantized)
    with bench.on(with_lora(handle), made) as attached:
        assert torch.equal(bench.run(attached.handle, settings()), after)
    assert gap(after, quantized) > 0.3 * gap(full, plain) > 1e-3
    assert torch.equal(bench.run(handle, settings()), plain)
