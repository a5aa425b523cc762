"""What training needs besides the networks: losses, optimizers, averages and the pace."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn


class Velocity:
    """v of a scheduler's noise, weighted min(1, 5 / (snr + 1)) (Hang et al. 2023).

    alphas: its cumulative products, (T,).
    """

    def __init__(self, alphas: Tensor) -> None:
        self.alphas = alphas

    def noised(self, clean: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        """The noisy latents (B, 4, H, W) at `share` (B,) of the way to noise, and what is learned.

        Returns (noisy, timestep (B,), target, weight of each row's error (B,)).
        """
        last = len(self.alphas) - 1
        time = (share * len(self.alphas)).long().clamp(max=last)
        a = self.alphas[time]
        signal, sigma = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
        target = signal * noise - sigma * clean
        weight = (5 * (1 - a)).clamp(max=1)  # 1 / (snr + 1) = 1 - a
        return signal * clean + sigma * noise, time, target, weight


class Flow:
    """The velocity of flow matching (Lipman et al. 2022, Liu et al. 2022), evenly over its time."""

    def noised(self, clean: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        """As of `Velocity`; the timestep is 1000 times the share of noise."""
        s = share[:, None, None, None]
        return (1 - s) * clean + s * noise, 1000 * share, noise - clean, torch.ones_like(share)


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of (B, 4, H, W), rows weighted by (B,)."""
    return (weight * ((prediction.float() - target) ** 2).mean((1, 2, 3))).mean()


@torch.no_grad()
def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to x (N, rows, columns): Newton-Schulz, in bf16."""
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): matrices of one shape are orthogonalized in one batch.

    A convolution is the matrix (out, in x kh x kw).

    Updates are scaled by 0.2 sqrt(max(rows, columns)), so AdamW's learning rates apply.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            by_shape = defaultdict[torch.Size, list[Tensor]](list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                grad = torch.stack([p.grad.flatten(1) for p in params])
                state = self.state[params[0]]
                buffer = state.setdefault("momentum", torch.zeros_like(grad))
                buffer.lerp_(grad, 1 - group["momentum"])
                update = orthogonalize(grad.lerp(buffer, group["momentum"])).to(grad.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
                scale = -group["lr"] * 0.2 * math.sqrt(max(grad.shape[1:]))
                torch._foreach_add_(params, [u.view(shape) for u in update], alpha=scale)


def optimizers(model: nn.Module, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside blocks (`matrix_lr` 0: AdamW for all)."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = "block" in name or "layers." in name  # of the denoiser, and of CLIP
        inside = inside and not name.endswith(("scale_shift_table", "bias.weight"))
        (matrices if matrix_lr and p.ndim in (2, 4) and inside else others).append(p)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-8)
    return [adam, Muon(matrices, lr=matrix_lr, decay=0.02)] if matrices else [adam]


class Average:
    """An exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights of now."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The averaged weights whose names start with `prefix`, without it."""
        rows = zip(self.names, self.mean, strict=True)
        return {n.removeprefix(prefix): p for n, p in rows if n.startswith(prefix)}


class Pace:
    """Progress of a stage in [0, 1] by the clock of the first process, equal on all of them."""

    def __init__(self, accelerator: Accelerator, seconds: float, warmup: int) -> None:
        accelerator.wait_for_everyone()
        self.device, self.seconds, self.warmup = accelerator.device, seconds, warmup
        self.start, self.progress = time.monotonic(), 0.0

    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.start

    def rate(self, step: int, every: int = 10) -> float:
        """The factor of the learning rate: a warm-up, then a decay over the last 40 %."""
        if step < every or step % every == 0:
            now = torch.tensor(self.elapsed() / self.seconds, device=self.device)
            self.progress = min(1.0, float(broadcast(now, from_process=0)))
        return min(1.0, (step + 1) / self.warmup) * min(1.0, (1 - self.progress) / 0.4)


class Log:
    """Prints the pace of training on the first process, every `every` seconds."""

    def __init__(self, accelerator: Accelerator, pace: Pace, batch: int, every: float) -> None:
        self.main, self.pace, self.every = accelerator.is_main_process, pace, every
        self.batch = batch * accelerator.num_processes
        self.last, self.last_step = 0.0, 0

    def line(self, step: int, **values: Tensor | float) -> None:
        """Print one line if it is time for one; only then are the values read."""
        now = self.pace.elapsed()
        if not self.main or now - self.last < self.every:
            return
        rate = (step - self.last_step) * self.batch / (now - self.last)
        self.last, self.last_step = now, step
        shown = " ".join(f"{k} {float(torch.as_tensor(v).detach()):.4g}" for k, v in values.items())
        seen = step * self.batch
        print(f"{now:6.1f} s  step {step}  seen {seen}  {rate:.0f}/s  {shown}", flush=True)
