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

from ..files import bits_of
from ..resume import Work
from .output_kernel import OutputKernel
from .pipeline_call import PipelineCall
from .plain import Packed, unpacked
from .record import again
from .trajectory import Call, Trajectory

UNIT = "trajectory"
KERNEL = "kernel"
ABOUT = "about"  # JSON as uint8, beside the tensors


def keep(work: Work, trajectory: Trajectory) -> bool:
    """Store `trajectory` as a unit of `work`; False if a call holds something that cannot be."""
    store = Packed(_mark)
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
        Call(run, row, t, unpacked(inputs, tensors), denoiser="".join(of))  # older ones do not say
        for run, row, t, inputs, *of in about["calls"]
    ]
    known = Trajectory(
        tuple(about["timesteps"]), calls, about["seed"], about["batch"], about["runs"],
        about["steps"], about["guidance"], tuple(about["prompts"]),
        kernel=OutputKernel.of(tensors[KERNEL], about["kernel"]) if "kernel" in about else None,
    )  # fmt: skip
    return again(known, PipelineCall(pipe, prompts, steps, guidance, call), about["steps"], call)


def _mark(x: Tensor) -> str:
    """A hash of a tensor's type, shape and bytes."""
    text = f"{x.dtype}{tuple(x.shape)}".encode() + bits_of(x).numpy().tobytes()
    return hashlib.sha256(text).hexdigest()[:32]
