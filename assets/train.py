"""Trains the demo models. One stage a subcommand; each takes its `--seconds` and saves as it goes.

    python assets/train.py pack --source tiny-imagenet-200 --data DATA
    accelerate launch assets/train.py autoencoder --data DATA --out WORK --perceptual VGG
    accelerate launch assets/train.py denoiser --data DATA --out WORK --model transformer
    accelerate launch assets/train.py evaluate --data DATA --out WORK --features INCEPTION
    python assets/train.py smoke          # all of it at a tiny size, on a CPU, in a minute

DATA holds `train*.npz`, `val*.npz` and `classes.json`; WORK gets `autoencoder/` and `demo-MODEL/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from recipe_autoencoder import AutoencoderLoss, Critic, Perceptual
from recipe_data import (
    CaptionTable,
    GrowingPictures,
    caption,
    class_names,
    pack,
    read_split,
    synthetic,
    write_prompts,
)
from recipe_inception import load_inception
from recipe_measure import (
    GRID,
    batches,
    draw,
    features,
    frechet,
    kernel_distance,
    psnr,
    reconstruct,
    save_grid,
)
from recipe_models import (
    KINDS,
    TextToImage,
    build_autoencoder,
    build_scheduler,
    fold_statistics,
    replace_folder,
    save_half,
    save_pipeline,
)
from recipe_training import (
    Average,
    Flow,
    Log,
    Pace,
    Velocity,
    optimizers,
    weighted_error,
)
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

Arguments = argparse.Namespace


def start(args: Arguments) -> Accelerator:
    """The processes of a stage: seeded apart, bf16 on GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    precision = "bf16" if torch.cuda.is_available() else "no"
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[ddp])
    set_seed(args.seed)
    return accelerator


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Scale an optimizer's learning rates to `rate` of what they were at first."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.setdefault("first_lr", group["lr"])


def autoencoder(args: Arguments) -> None:
    """Train the autoencoder, normalise its latents, save it as WORK/autoencoder."""
    accelerator = start(args)
    pictures = GrowingPictures(args.data, accelerator.device, args.pictures)
    folder = args.out / "autoencoder"
    vae = AutoencoderKL.from_pretrained(args.init) if args.init else build_autoencoder(args.size)
    perceptual = Perceptual(args.perceptual, args.perceptual_size) if args.perceptual else None
    for part in (vae.encoder, vae.quant_conv) if args.frozen_encoder else ():
        part.requires_grad_(False)
    critic = Critic() if perceptual and args.critic else None
    loss_module = AutoencoderLoss(vae, perceptual, critic, args.kl, args.critic)
    loss_module.to(accelerator.device, memory_format=torch.channels_last)
    if args.compile and perceptual:  # compiling the autoencoder takes longer than it saves
        perceptual.compile(dynamic=False)
    average = Average(vae, args.average)
    model = accelerator.prepare(loss_module)
    set_seed(args.seed, device_specific=True)
    stack = optimizers(vae, args.lr, 0)
    if critic is not None:
        stack.append(torch.optim.AdamW(critic.parameters(), lr=3e-4, betas=(0.5, 0.99)))
    pace = Pace(accelerator, args.seconds, args.warmup)
    log, saved, step = Log(accelerator, pace, args.batch, args.log), 0.0, 0
    while (rate := pace.rate(step)) > 0:
        x = pictures.batch(args.batch).to(memory_format=torch.channels_last)
        if step >= args.warmup and step % 20 == 0:
            loss_module.balance(x[:16])
        loss, l1, lpips, hinge = model(x)
        loss.backward()
        clip_grad_norm_(average.live, 1.0)
        for optimizer in stack:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        step += 1
        facts = {"l1": l1, "lpips": lpips, "hinge": hinge, "weight": loss_module.weight}
        log.line(step, **facts, lr=rate * args.lr, pictures=pictures.count)
        if accelerator.is_main_process and pace.elapsed() - saved > args.save:
            saved = pace.elapsed()
            weights = vae.state_dict() | average.weights()
            replace_folder(folder, lambda new, weights=weights: save_half(vae, new, weights))
    if accelerator.is_main_process:
        finish_autoencoder(vae, average, pictures, folder, args)
    accelerator.end_training()


def finish_autoencoder(
    vae: AutoencoderKL, average: Average, pictures: GrowingPictures, folder: Path, args: Arguments
) -> None:
    """Take the averaged weights, fold the latents' statistics in, save and check."""
    vae.load_state_dict(average.weights(), strict=False)  # frozen parts have no average
    latents = encode(vae, pictures.pictures[: min(pictures.count, 20_000)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    print(f"latents: mean {mean.tolist()} std {std.tolist()}")
    if not args.frozen_encoder:  # else there may be denoisers that know these latents
        fold_statistics(vae, mean, std)
    replace_folder(folder, lambda new: save_half(vae, new))
    val, _ = read_split(args.data, "val") if any(args.data.glob("val*")) else (None, None)
    if val is not None:
        again = AutoencoderKL.from_pretrained(folder).to(vae.device)
        print(f"autoencoder: PSNR {psnr(val, reconstruct(again, val, vae.device)):.2f} dB on val")


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The latents' means (N, 4, 16, 16) of pictures (N, 3, 64, 64) uint8, on the vae's device."""
    half = torch.autocast(vae.device.type, torch.bfloat16, enabled=vae.device.type == "cuda")
    with half:
        rows = [vae.encode(x).latent_dist.mode().float() for x in batches(pictures, vae.device)]
    return torch.cat(rows)


def tokenizer_of(args: Arguments, accelerator: Accelerator) -> Any:
    """The tokenizer of the model that training starts from, or one built by the first process."""
    kind, folder = KINDS[args.model], args.out / f"tokenizer-{args.model}"
    if args.init:
        return kind.read_tokenizer(args.init / "tokenizer")
    if accelerator.is_main_process:
        kind.build_tokenizer(class_names(args.data)).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return kind.read_tokenizer(folder)


def denoiser(args: Arguments) -> None:
    """Train a denoiser with its text encoder; WORK/demo-MODEL is the diffusers folder."""
    accelerator, kind = start(args), KINDS[args.model]
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    names, folder = class_names(args.data), args.out / f"demo-{args.model}"
    tokenizer = tokenizer_of(args, accelerator)
    table = CaptionTable(tokenizer, names, device, args.drop, kind.masked)
    vae = AutoencoderKL.from_pretrained(args.autoencoder or args.out / "autoencoder")
    vae = vae.to(device).eval()
    if args.init:
        text_encoder = kind.read_text(args.init / "text_encoder", dtype="float32")
        network = kind.build(args.size)  # in its memory format
        network.load_state_dict(kind.read(args.init / kind.part).state_dict())
    else:
        text_encoder, network = kind.build_text(args.size, tokenizer), kind.build(args.size)
    pictures, labels = read_split(args.data, "train", rank, world)
    labels = labels.to(device).repeat(2)
    latents = torch.cat([encode(vae, pictures), encode(vae, pictures.flip(-1))])
    latents = latents.to(torch.float16 if device.type == "cuda" else torch.float32)
    inner = TextToImage(network, text_encoder, kind.masked).to(device)
    if args.compile:
        for module in kind.compiled(network):
            module.compile(dynamic=False)
    average = Average(inner, args.average)
    model = accelerator.prepare(inner)
    set_seed(args.seed, device_specific=True)
    learned = Flow() if args.flow else Velocity(build_scheduler().alphas_cumprod.to(device))
    stack = optimizers(inner, args.lr, args.matrix_lr)

    def save() -> None:
        settings = {"guidance": args.guidance, "steps": 20}
        weights = average.weights()
        parts = vae, network, text_encoder, tokenizer
        save_pipeline(folder, kind, *parts, weights, settings, args.flow)

    pace = Pace(accelerator, args.seconds, args.warmup)
    log, saved, step = Log(accelerator, pace, args.batch, args.log), 0.0, 0
    strata = torch.arange(args.batch, device=device)
    while (rate := pace.rate(step)) > 0:
        index = torch.randint(len(labels), (args.batch,), device=device)
        clean, noise = latents[index].float(), torch.randn(args.batch, 4, 16, 16, device=device)
        share = (strata + torch.rand(args.batch, device=device)) / args.batch
        noisy, time, target, weight = learned.noised(clean, noise, share)
        prediction = model(noisy, time, *table.draw(labels[index]))
        loss = weighted_error(prediction, target, weight)
        loss.backward()
        norm = clip_grad_norm_(average.live, 1.0)
        for optimizer in stack:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        step += 1
        log.line(step, loss=loss, norm=norm, lr=rate * args.lr)
        if accelerator.is_main_process and pace.elapsed() - saved > args.save:
            saved = pace.elapsed()
            save()
    if accelerator.is_main_process:
        save()
    accelerator.end_training()


def evaluate(args: Arguments) -> None:
    """FID and KID by guidance and of the autoencoder alone, and a grid of 16 classes x 4."""
    accelerator, kind = start(args), KINDS[args.model]
    device, folder = accelerator.device, args.out / f"demo-{args.model}"
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = kind.pipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    names = class_names(args.data)
    val, _ = read_split(args.data, "val")
    network = load_inception(args.features, device) if args.features else None
    target = features(network, val, device) if network else None
    tasks = [0.0, *args.guidances][accelerator.process_index :: accelerator.num_processes]
    for guidance in tasks:
        if guidance:
            every = [caption(n[0], "a photo of {a}{x}") for n in names]
            texts = [every[i % len(every)] for i in range(len(val))]
            drawn = draw(pipeline, texts, guidance, args.steps, args.seed, **kind.call)
        else:
            drawn = reconstruct(pipeline.vae, val, device)
            print(f"reconstruction: PSNR {psnr(val, drawn):.2f} dB", flush=True)
        if network:
            rows = features(network, drawn, device)
            fid, kid = frechet(rows, target), kernel_distance(rows, target) * 1000
            what = f"guidance {guidance}" if guidance else "reconstruction"
            print(f"{what}: FID-10k {fid:.2f}  KID x 1000 {kid:.2f}", flush=True)
    if accelerator.is_main_process:
        grid(args, pipeline)
    accelerator.end_training()


def grid(args: Arguments, pipeline: object) -> None:
    """Draw 16 classes x 4 pictures at the guidance that ships: two classes a row."""
    texts = [caption(name, "a photo of {a}{x}") for name in GRID for _ in range(4)]
    call = KINDS[args.model].call
    drawn = draw(pipeline, texts, args.guidance, args.steps, args.seed, **call)
    save_grid(drawn, args.out / f"grid-{args.model}.jpg", columns=8)


def picture(args: Arguments) -> None:
    """Draw the grid of WORK/demo-MODEL again, at its own guidance."""
    folder = args.out / f"demo-{args.model}"
    args.guidance = json.loads((folder / "tenuto.json").read_text())["guidance"]
    pipeline = KINDS[args.model].pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    grid(args, pipeline)


def smoke(args: Arguments) -> None:
    """Every stage at a tiny size on synthetic pictures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, out = args.data or Path(folder, "data"), args.out or Path(folder, "work")
        if args.data is None:
            synthetic(data)
        common = ["--data", str(data), "--out", str(out)]
        tiny = [*common, "--size", "tiny", "--batch", "8", "--seconds", "3", "--log", "1"]
        tiny += ["--no-compile", "--warmup", "5", "--save", "2"]
        again = ["--init", str(out / "autoencoder"), "--frozen-encoder"]
        other = ["--out", str(out / "flow"), "--autoencoder", str(out / "autoencoder")]
        for stage in (
            ["autoencoder", *tiny, "--pictures", "64"],
            ["autoencoder", *tiny, "--pictures", "64", *again],
            ["denoiser", *tiny],
            ["denoiser", *tiny, "--init", str(out / "demo-transformer")],
            ["denoiser", *tiny, "--model", "unet"],
            ["denoiser", *tiny, "--flow", *other],
            ["evaluate", *common, "--steps", "2", "--guidances", "2", "--model", "unet"],
            ["evaluate", *common, "--steps", "2", "--guidances", "2"],
        ):
            print("smoke:", *stage)
            main(stage)
        size = sum(f.stat().st_size for f in (out / "demo-transformer").rglob("*"))
        print(json.dumps({"bytes": size, "grid": (out / "grid-transformer.jpg").exists()}))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    style = argparse.RawTextHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    stages = top.add_subparsers(required=True)

    def stage(name: str, run: object, training: bool = False) -> argparse.ArgumentParser:
        p = stages.add_parser(name, help=run.__doc__, description=run.__doc__)
        p.set_defaults(run=run)
        p.add_argument("--data", type=Path, default=os.environ.get("TENUTO_DATA"), help="DATA")
        p.add_argument("--out", type=Path, help="WORK")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--model", choices=tuple(KINDS), default="transformer")
        p.add_argument("--guidance", type=float, default=2.5, help="written to tenuto.json")
        if training:
            p.add_argument("--size", choices=("demo", "tiny"), default="demo")
            p.add_argument("--init", type=Path, help="warm start from these saved (fp16) weights")
            p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
            p.add_argument("--log", type=float, default=10, help="seconds between log lines")
            p.add_argument("--save", type=float, default=120, help="seconds between saves")
            p.add_argument("--average", type=float, default=0.999, help="decay of the average")
        return p

    p = stage("autoencoder", autoencoder, True)
    p.add_argument("--seconds", type=float, default=330, help="the stage's time, decay included")
    p.add_argument("--batch", type=int, default=128, help="pictures a step and process")
    p.add_argument("--lr", type=float, default=6e-4)
    p.add_argument("--warmup", type=int, default=300, help="steps")
    p.add_argument("--kl", type=float, default=1e-6)
    p.add_argument("--perceptual", type=Path, help="LPIPS VGG-16 weights (without: L1 only)")
    p.add_argument("--perceptual-size", type=int, default=128, help="pixels a side for LPIPS")
    p.add_argument("--critic", type=float, default=0, help="share of a critic's gradient; 0: none")
    p.add_argument("--frozen-encoder", action="store_true", help="train the decoder alone")
    p.add_argument("--pictures", type=int, default=100_000, help="how many there will be")
    p = stage("denoiser", denoiser, True)
    p.add_argument("--seconds", type=float, default=750, help="the stage's time, decay included")
    p.add_argument("--batch", type=int, default=2048, help="latents a step and process")
    p.add_argument("--lr", type=float, default=1e-3, help="of AdamW")
    p.add_argument("--matrix-lr", type=float, default=2e-3, help="of Muon; 0: AdamW for all")
    p.add_argument("--warmup", type=int, default=300, help="steps")
    p.add_argument("--drop", type=float, default=0.1, help="share of empty prompts")
    p.add_argument("--autoencoder", type=Path, help="of latents (default: WORK/autoencoder)")
    p.add_argument("--flow", action="store_true", help="learn flow matching in place of v")
    p = stage("evaluate", evaluate)
    p.add_argument("--features", type=Path, help="weights of benchmarks/convert_inception.py")
    p.add_argument("--guidances", type=float, nargs="+", default=[1.5, 2, 2.5, 3, 4])
    p.add_argument("--steps", type=int, default=20)
    p = stage("picture", picture)
    p.add_argument("--steps", type=int, default=20)
    stage("smoke", smoke)
    stage("prompts", lambda args: write_prompts(args.data, args.out))
    stage("pack", lambda args: pack(args.source, args.data)).add_argument("--source", type=Path)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Run one stage; `--smoke` alone is the stage of that name."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(["smoke" if word == "--smoke" else word for word in given])
    args.run(args)


if __name__ == "__main__":
    main()
