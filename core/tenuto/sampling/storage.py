"""A recorded trajectory on disk, so that long work that was stopped does not record again.

Tensors that recur from call to call (prompt embeddings) are stored once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..work import Work, bits_of
from .output_kernel import OutputKernel
from .pipeline_call import PipelineCall
from .record import again
from .trajectory import Call, Trajectory

UNIT = "trajectory"
KERNEL = "kernel"
ABOUT = "about"  # JSON as uint8, beside the tensors
PLAIN = (str, int, float, bool, type(None))


def keep(work: Work, trajectory: Trajectory) -> bool:
    """Store `trajectory` as a unit of `work`; False if a call holds something that cannot be."""
    store = _Store()
    try:
        calls = [
            [c.run, c.row, c.timestep, store.put(c.inputs), c.denoiser] for c in trajectory.calls
        ]
    except TypeError:
        return False
    about = {
        "timesteps": trajectory.timesteps,
        "calls": calls,
        "seed": trajectory.seed,
        "batch": trajectory.batch,
        "runs": trajectory.runs,
        "steps": trajectory.steps,
        "guidance": trajectory.guidance,
        "prompts": trajectory.prompts,
    }
    kernel = trajectory.kernel
    if kernel is not None:
        about["kernel"], store.tensors[KERNEL] = kernel.about(), kernel.stored
    text = bytearray(json.dumps(about).encode())
    work.save(UNIT, store.tensors | {ABOUT: torch.frombuffer(text, dtype=torch.uint8)})
    return True


def kept(
    work: Work,
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
    call: Mapping[str, Any] | None = None,
) -> Trajectory | None:
    """The trajectory that `keep` stored, ready to be run again with `pipe`, or None."""
    tensors = work.load(UNIT)
    if tensors is None:
        return None
    about = json.loads(bytes(tensors[ABOUT].tolist()))
    calls = [
        Call(run, row, t, _full(inputs, tensors), denoiser="".join(of))  # older ones do not say
        for run, row, t, inputs, *of in about["calls"]
    ]
    known = Trajectory(
        tuple(about["timesteps"]), calls, about["seed"], about["batch"], about["runs"],
        about["steps"], about["guidance"], tuple(about["prompts"]),
        kernel=OutputKernel.of(tensors[KERNEL], about["kernel"]) if "kernel" in about else None,
    )  # fmt: skip
    return again(known, PipelineCall(pipe, prompts, steps, guidance, call), about["steps"], call)


class _Store:
    """Nested inputs as plain data; each tensor becomes ["tensor", key], equal ones share a key."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def put(self, value: Any) -> Any:
        """`value` as plain data; TypeError if something in it is neither plain nor a tensor."""
        if isinstance(value, Tensor):
            return ["tensor", self._key(value)]
        if type(value) is dict:
            return ["dict", [[self.put(k), self.put(v)] for k, v in value.items()]]
        if type(value) in (list, tuple):
            return [type(value).__name__, [self.put(v) for v in value]]
        if not isinstance(value, PLAIN):
            raise TypeError(type(value).__name__)
        return ["plain", value]

    def _key(self, x: Tensor) -> str:
        text = f"{x.dtype}{tuple(x.shape)}".encode() + bits_of(x).numpy().tobytes()
        key = hashlib.sha256(text).hexdigest()[:32]
        self.tensors[key] = x
        return key


def _full(value: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_full(k, tensors): _full(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        parts = [_full(v, tensors) for v in content]
        return tuple(parts) if kind == "tuple" else parts
    return content
