"""Where a sampling run stands: steps, runs, streams."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto.sampling.clock import Clock
from tenuto.sampling.follow import Follow
from tenuto.sampling.grid import grid_from

TIMES = (999, 749, 499, 249)


def seen(clock: Clock, t: Any, *conditions: Tensor, batch: int | None = None) -> tuple[Any, ...]:
    """The streams of one call."""
    clock.observe(t, batch or len(conditions[0]), conditions, "cpu")
    return clock.streams


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timestep", "row"),
    [(999, 0), (1500, 0), (875, 0), (873, 1), (749, 1), (500.5, 2), (300, 3), (0, 3), (-4, 3)],
)
def test_the_nearest_calibrated_step(timestep: float, row: int) -> None:
    clock = Clock(TIMES)
    assert clock.nearest(timestep) == row
    clock.tick(timestep, [0])
    assert clock.step == row
    assert clock.index.tolist() == [row]
    assert clock.index.dtype is torch.int64 and clock.index.shape == (1,)


@pytest.mark.parametrize(
    "given",
    [499, 499.0, torch.tensor(499), torch.tensor([499]), torch.tensor([499.0, 499.0]),
     torch.tensor(499.0, dtype=torch.float16), torch.tensor([499, 499], dtype=torch.int32)],
)  # fmt: skip
def test_a_timestep_in_any_form(given: Any) -> None:
    clock = Clock(TIMES)
    clock.observe(given, 2, [torch.randn(2, 3)], "cpu")
    assert clock.step == 2
    clock.observe(given, 2, [], "cpu")
    assert clock.step == 2


def test_no_calibrated_steps_at_all() -> None:
    clock = Clock(())
    clock.observe(torch.tensor(10), 2, [torch.randn(2, 3)], "cpu")
    assert clock.step == 0 and clock.index.tolist() == [0]


# --- runs -----------------------------------------------------------------------------------------


def test_going_back_in_time_starts_a_run() -> None:
    clock = Clock(TIMES)
    runs = []
    for t in [*TIMES, *TIMES, 999, 499, 749]:
        clock.tick(t, [0])
        runs.append(clock.run)
    assert runs[:4] == [runs[0]] * 4
    assert runs[4:8] == [runs[0] + 1] * 4
    assert runs[8:] == [runs[0] + 2, runs[0] + 2, runs[0] + 3]


def test_evaluating_a_step_twice_goes_on_with_the_run() -> None:
    """Second-order samplers call at every inner step twice; other step counts map to one row."""
    clock = Clock(TIMES)
    runs = set()
    for t in [999, 749, 749, 499, 499, 400, 260, 249, 249]:
        clock.tick(t, [0])
        runs.add(clock.run)
    assert len(runs) == 1


def noise(seed: int, batch: int = 2) -> Tensor:
    """A sample of pure noise."""
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def runs_of(clock: Clock, *calls: tuple[float, Tensor]) -> list[int]:
    """The run of each call of one prompt: (timestep, sample)."""
    found = []
    for t, x in calls:
        clock.observe(torch.tensor(t), len(x), [torch.ones(1, 3)], "cpu", x)
        found.append(clock.run)
    return found


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_a_new_sample_at_the_first_step_starts_a_run(start: int, inference: bool) -> None:
    """A run that was interrupted after its first call, or has one step, and the next one."""
    with torch.inference_mode(inference):
        one, other = noise(1), noise(2)
        found = runs_of(Clock(TIMES), *((float(TIMES[start]), x) for x in (one, other, one)))
    assert found == [0, 1, 2]


def test_noise_that_rises_within_a_calibrated_step_starts_a_run() -> None:
    """Image-to-image at more steps than were calibrated."""
    x = noise(1)
    assert runs_of(Clock(TIMES), (300.0, x), (240.0, x), (290.0, x)) == [0, 0, 1]


def test_steps_may_go_upwards() -> None:
    """Families that count from noise to image."""
    clock = Clock((0.0, 0.5, 0.9))
    x = noise(1)
    assert runs_of(clock, (0.0, x), (0.5, x), (0.9, x), (0.5, x)) == [0, 0, 0, 1]


def test_another_pass_of_a_step_goes_on_with_the_run() -> None:
    """Perturbed attention, guidance in two calls: the same sample, whatever the conditions."""
    clock, runs = Clock(TIMES), set()
    for t in TIMES:
        x = noise(t)
        for condition in (0, 1, 1):
            clock.observe(t, 2, [torch.full((2, 3), float(condition))], "cpu", x)
            runs.add(clock.run)
    assert runs == {0}


def test_second_order_steps_go_on_with_the_run() -> None:
    """Heun's method: two samples that are alike at every timestep but the first."""
    x, away = noise(1), 0.3 * noise(2)
    calls = [(999.0, x), *((float(t), y) for t in TIMES[1:] for y in (x + away, x))]
    assert set(runs_of(Clock(TIMES), *calls)) == {0}


def test_a_new_sample_at_a_repeated_step_starts_a_run() -> None:
    """After Euler's method, and after an interrupted run of Heun's."""
    x, near, other = noise(1), noise(1) + 0.3 * noise(2), noise(3)
    euler = [(999.0, x), (749.0, x), (499.0, x)]
    assert runs_of(Clock(TIMES), *euler, (499.0, near)) == [0, 0, 0, 1]
    assert runs_of(Clock(TIMES), (999.0, x), (749.0, x), (749.0, other)) == [0, 0, 1]
    heun = [(999.0, x), (749.0, near), (749.0, x)]
    assert runs_of(Clock(TIMES), *heun, (749.0, near)) == [0, 0, 0, 1]


def test_a_new_sample_after_a_leap_starts_a_run() -> None:
    """An interrupted run, and image-to-image that starts later; fewer steps are one run."""
    x, near, other = noise(1), noise(1) + 0.3 * noise(2), noise(3)
    assert runs_of(Clock(TIMES), (999.0, x), (249.0, other)) == [0, 1]
    assert runs_of(Clock(TIMES), (999.0, x), (249.0, near)) == [0, 0]


def test_two_images_of_one_prompt_that_take_turns_are_never_one_run() -> None:
    """Call by call; nothing but the samples tells them apart."""
    calls = [(float(t), noise(seed)) for t in TIMES for seed in (1, 2)]
    found = runs_of(Clock(TIMES), *calls)
    assert len(set(found)) == len(calls)


def test_begin_forgets_the_step() -> None:
    clock = Clock(TIMES)
    clock.tick(249, [0])
    before = clock.run
    clock.begin()
    assert clock.run == before + 1
    clock.tick(249, [0])
    assert clock.run == before + 1


# --- streams --------------------------------------------------------------------------------------


@pytest.fixture
def prompts() -> Tensor:
    """Embeddings (5, 4, 6): the last three belong to the same prompt."""
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(3))
    return torch.cat([x[:2], x[2:3].expand(3, 4, 6)])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_halves_in_one_call_or_two(prompts: Tensor, order: tuple[int, int]) -> None:
    """Guidance: the empty prompt for all, then the prompts; the same ids either way."""
    empty = torch.zeros_like(prompts)
    together = seen(Clock(TIMES), 999, torch.cat([empty, prompts]))
    clock = Clock(TIMES)
    halves: dict[int, tuple[Hashable, ...]] = {}
    for half in order:
        halves[half] = seen(clock, 999, (empty, prompts)[half])
    assert halves[0] + halves[1] == together
    assert len(set(together)) == 10, "each row has an id of its own"
    turned = seen(Clock(TIMES), 999, torch.cat([prompts, empty]))
    assert turned == halves[1] + halves[0]


def test_distinct_pictures_in_any_split(prompts: Tensor) -> None:
    distinct = prompts[:3]
    whole = seen(Clock(TIMES), 999, distinct)
    clock = Clock(TIMES)
    assert [seen(clock, 999, distinct[i : i + 1])[0] for i in (2, 0, 1)] == [
        whole[2], whole[0], whole[1]
    ]  # fmt: skip
    assert seen(clock, 999, distinct[1:]) == whole[1:]


def test_equal_prompts_are_told_apart(prompts: Tensor) -> None:
    ids = seen(Clock(TIMES), 999, prompts)
    assert len(set(ids)) == 5


def test_ids_hold_from_step_to_step(prompts: Tensor) -> None:
    clock = Clock(TIMES)
    assert seen(clock, 999, prompts) == seen(clock, 749, prompts.clone()) == seen(clock, 5, prompts)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
     torch.uint8, torch.bool],
)  # fmt: skip
def test_conditions_of_any_type(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0]]).to(dtype)
    assert len(set(seen(Clock(TIMES), 1, x))) == 3
    assert seen(Clock(TIMES), 1, x[:2])[0] != seen(Clock(TIMES), 1, x[1:])[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([5, 0, 0, 5], [0, 5, 5, 0]),  # equal sums, equal first moments
        ([1, 0], [0, 1]),
        ([512, 1024, 0, 0], [1024, 512, 0, 0]),
        ([0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]),
    ],
)
def test_similar_conditions_differ(one: list[float], other: list[float]) -> None:
    """Size ids and masks are made of few values: a linear hash confuses them."""
    first = seen(Clock(TIMES), 1, torch.tensor([one]))
    assert first != seen(Clock(TIMES), 1, torch.tensor([other]))


def test_the_order_of_conditions_counts() -> None:
    a, b = torch.tensor([[3, 4]]), torch.tensor([[5, 6]])
    assert seen(Clock(TIMES), 1, a, b) != seen(Clock(TIMES), 1, b, a)
    assert seen(Clock(TIMES), 1, a, a) != seen(Clock(TIMES), 1, b, b)


def test_a_condition_that_was_written_to_is_read_again(prompts: Tensor) -> None:
    """Hashes are kept by object: no write, and no new object in the old place, may be missed."""
    clock, x = Clock(TIMES), prompts[:1].clone()
    before = seen(clock, 1, x)
    x.mul_(2)
    assert seen(clock, 1, x) != before
    with torch.inference_mode():
        y = prompts[:1].clone()
        before = seen(clock, 1, y)
        y.mul_(2)
        assert seen(clock, 1, y) != before
    ids = set()
    for value in range(60):  # each takes the memory of the one before
        ids.add(seen(clock, 1, torch.full((1, 4), float(value)))[0])
    assert len(ids) == 60


def test_every_condition_counts(prompts: Tensor) -> None:
    """Equal prompts, other labels."""
    same = prompts[:1].expand(2, 4, 6)
    ids = seen(Clock(TIMES), 1, same, torch.tensor([1, 2]))
    assert ids[0] != seen(Clock(TIMES), 1, same[:1], torch.tensor([3]))[0]
    assert seen(Clock(TIMES), 1, same[:1], torch.tensor([2]))[0] == ids[1]


def test_one_row_for_all_counts_too(prompts: Tensor) -> None:
    """An embedding given once and broadcast tells two calls apart as one per image does."""
    empty, prompt = torch.zeros(1, 4, 6), prompts[:1]
    clock = Clock(TIMES)
    assert seen(clock, 1, empty, batch=3) != seen(clock, 1, prompt, batch=3)
    assert len(set(seen(clock, 1, prompt, batch=3))) == 3


def test_without_conditions_rows_are_counted() -> None:
    clock = Clock(TIMES)
    clock.observe(999, 3, [], "cpu")
    first = clock.streams
    clock.observe(749, 3, [], "cpu")
    assert clock.streams == first and len(set(first)) == 3


# --- what it costs --------------------------------------------------------------------------------


class OnDevice(Tensor):
    """A tensor that counts how often the host looks at it, or at what was computed from it."""

    reads: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_host = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__",
                   "__index__", "__array__"}  # fmt: skip
        if name in to_host:
            OnDevice.reads.append(name)
            return func(*(_bare(a) for a in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def _bare(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("conditions", [0, 1, 3])
def test_one_read_from_the_device_a_call(conditions: int) -> None:
    OnDevice.reads = []
    t = torch.tensor([499, 499]).as_subclass(OnDevice)
    given = [torch.randn(2, 5).as_subclass(OnDevice) for _ in range(conditions)]
    clock = Clock(TIMES)
    sample = torch.randn(2, 4, 8, 8).as_subclass(OnDevice)
    clock.observe(t, 2, given, "cpu", sample)
    assert len(OnDevice.reads) == 1
    assert clock.step == 2
    float(t[0])
    assert len(OnDevice.reads) == 2, "this test counts nothing"


# --- copies, contexts, compile --------------------------------------------------------------------


def test_a_copied_model_has_one_clock_of_its_own() -> None:
    """At the same step; all that is copied together shares it."""
    clock = Clock(TIMES)
    clock.tick(499, ("a",))
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for part in module:
        part.clock = clock  # type: ignore[assignment]
    one, other = (part.clock for part in copy.deepcopy(module))
    assert one is other and one is not clock
    assert isinstance(one, Clock)
    assert (one.step, one.exact, one.streams, one.index.tolist()) == (2, True, ("a",), [2])
    one.tick(249, ("b",))
    assert (clock.step, clock.streams, clock.index.tolist()) == (2, ("a",), [2])


class Tiny(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return sample


def test_a_hook_follows_until_it_is_removed() -> None:
    clock, denoiser = Clock(TIMES), Tiny()
    hook = Follow(denoiser, clock)
    denoiser(torch.zeros(2, 3), torch.tensor(499), labels=torch.tensor([1, 2]))
    assert clock.step == 2 and len(clock.streams) == 2
    hook.remove()
    assert not denoiser._forward_pre_hooks
    denoiser(torch.zeros(2, 3), torch.tensor(999), torch.tensor([1, 2]))
    assert clock.step == 2, "it is not followed any more"


@pytest.fixture
def compiler() -> Iterator[Any]:
    """A backend that runs graphs as they are and counts how often it was asked for one."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    reset()
    yield CompileCounter()
    reset()


def test_the_index_compiles_once(compiler: Any) -> None:
    """A host integer would be compiled in: the table would be read at the first step for ever."""
    clock = Clock(TIMES)
    table = torch.arange(4.0)

    def scaled(x: Tensor) -> Tensor:
        return x * table.index_select(0, clock.index)

    compiled = torch.compile(scaled, backend=compiler, fullgraph=True)
    for row, t in enumerate(TIMES):
        clock.tick(t, [0])
        assert compiled(torch.ones(3)).tolist() == [row] * 3
    assert compiler.frame_count == 1


def test_a_view_of_what_was_just_computed_is_no_new_run() -> None:
    """k-diffusion's timesteps of a batch: a view of other memory at every call."""
    clock = Clock((999.0, 500.0))
    for value in (999, 999, 500):
        clock.observe(torch.full((4,), value).view(2, 2)[0], 2, [], "cpu")
    assert clock.run == 0


@pytest.mark.parametrize(
    ("times", "first", "found"),
    [
        ([1000.0, 500.5, 1.0], 1.0, [1.0, 0.5005, 0.001]),  # over 1000, as AuraFlow: not its last
        ([1000.0, 500.5, 1.0], 1000.0, [1000.0, 500.5, 1.0]),
        ([1000.0, 500.5, 1.0], 0.0, [0.0, 0.4995, 0.999]),  # 1 - t / 1000, as Lumina 2
        ([1000.0, 500.5, 1.0], 500.5, [500.5, 1.0]),  # image to image
        ([0.9, 0.6, 0.3], 0.6, [0.6, 0.3]),
        ([0.9, 0.6, 0.3], 700.0, []),
    ],
)
def test_the_unit_of_a_runs_timesteps(times: list[float], first: float, found: list[float]) -> None:
    assert grid_from(times, first) == pytest.approx(tuple(found))
