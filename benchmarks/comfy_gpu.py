"""A ComfyUI of one's own on a GPU: SDXL's shapes, plain and with Tenuto's nodes, a LoRA on both.

    python benchmarks/comfy_gpu.py FOLDER [--python PYTHON] [--memory dynamic legacy] [--out FILE]

FOLDER has ComfyUI's main.py; PYTHON is one that starts it (0.33.0 was tried). A process for each
way of the host's to hold weights: `dynamic`, its default on NVIDIA's cards, and `legacy`, what
`--disable-dynamic-vram` gives. Each loads the same file of random weights by the host's own loader
and samples in turn:
    plain               the model
    LoRA                with a LoRA of 64 layers
    quantized           Tenuto Quantize Model (W8A8, rounded on the fly; `--scheme` for others)
    quantized, LoRA     the LoRA before it
    faster              Tenuto Speed Up at 2, the quantized model with the LoRA
    plain again         the model: its image must be the first one, bit for bit
Then, in a process of its own, which never has the plain model on the card:
    loader              Tenuto Loader: an artifact in W8A8 in the place of the float weights
    loader, LoRA        and the LoRA after it
    loader, faster      and Tenuto Speed Up at 2
One JSON line a row: seconds of the second run of each (its first one packs and chooses), the most
memory of the card while it ran (by the driver, so that the host's own pools count), PSNR of the
latents to the row of the float model with the same LoRA. Random weights: no images to look at.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SDXL = {
    "in_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_heads": -1,
    "num_head_channels": 64, "use_linear_in_transformer": True, "adm_in_channels": 2816,
    "num_classes": "sequential",
}  # fmt: skip
SD15 = {
    "in_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "num_heads": 8,
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768,
    "transformer_depth_middle": 1, "num_head_channels": -1, "use_linear_in_transformer": False,
}  # fmt: skip
SHAPES = {"sdxl": SDXL, "sd15": SD15}
FILES, LOADER = "files", ", loader"  # the process that makes them; the end of one's name
ARTIFACT = "mine"
TARGETS, RANK = 64, 16  # layers and rank of the LoRA


def main() -> None:
    """One process for each way to hold weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of ComfyUI")
    parser.add_argument("--python", default=sys.executable, help="one that starts it")
    parser.add_argument("--memory", nargs="+", default=["dynamic", "legacy"])
    parser.add_argument("--model", default="sdxl", choices=SHAPES)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scheme", default="W8A8", help="of Tenuto Quantize Model")
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--files", type=Path, help="a folder for the model and the LoRA")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        both = [each + end for each in args.memory for end in ("", LOADER)]
        for memory in (FILES, *both):  # the last --files and --child given are taken
            more = ["--child", memory, "--files", str(args.files or folder)]
            done = subprocess.run([args.python, "-u", __file__, *sys.argv[1:], *more])
            if done.returncode:
                print(json.dumps({"memory": memory, "failed": done.returncode}), flush=True)


def child(args: argparse.Namespace) -> None:
    """All rows of one way to hold weights, or the files that they load."""
    begin(args.folder, args.child.startswith("dynamic"), args.files)
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_grad_enabled(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file, lora = args.files / f"{args.model}.safetensors", args.files / "lora.safetensors"
    if args.child == FILES:  # under dynamic VRAM a new layer has no weight to write
        return None if file.exists() else written(args, file, lora)
    about = {"memory": args.child, "model": args.model, "pixels": args.pixels, **versions(device)}
    latents = args.files / "latents.safetensors"  # of the float model
    found: dict[str, Any] = load_file(latents) if args.child.endswith(LOADER) else {}
    for row, model in models(args, str(file), str(lora)):
        times = []
        with watched(device) as most:
            for _ in range(2):
                start = time.perf_counter()
                found[row] = sampled(model, args).cpu().float()
                times.append(time.perf_counter() - start)
        right = found["LoRA" if "LoRA" in row or "faster" in row else "plain"]
        line = {"row": row, "first": times[0], "seconds": times[1], "psnr": far(right, found[row])}
        if row == "plain again":
            line["equal"] = bool(torch.equal(found[row], found["plain"]))
        line |= {"patcher": type(model).__name__, "gib": max(most) / 2**30 if most else None}
        text = json.dumps(line | about)
        print(text, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as out:
                out.write(f"{text}\n")
    if not args.child.endswith(LOADER):
        save_file({name: found[name] for name in ("plain", "LoRA")}, latents)


def begin(folder: Path, dynamic: bool, files: Path) -> None:
    """What ComfyUI's main.py does before it loads a model, as far as memory and folders go."""
    sys.path[:0] = [str(folder), str(ROOT), str(ROOT / "core")]
    cuda = Path("/dev/nvidiactl").exists()
    sys.argv = [sys.argv[0], "--use-pytorch-cross-attention", *([] if cuda else ["--cpu"])]
    sys.argv += [] if dynamic else ["--disable-dynamic-vram"]
    importlib.import_module("comfy.options").enable_args_parsing()
    places = importlib.import_module("folder_paths")
    for kind in ("tenuto", "diffusion_models"):
        places.add_model_folder_path(kind, str(files.absolute()), is_default=True)
    if not (dynamic and cuda):
        return
    control = importlib.import_module("comfy_aimdo.control")
    control.init()  # before torch has a context
    memory = importlib.import_module("comfy.model_management")
    devices = [d.index for d in memory.get_all_torch_devices()]
    try:
        there = control.init_devices((index, 0) for index in devices)
    except TypeError:  # before 0.4.10
        there = control.init_devices(iter(devices))
    if not there:
        raise SystemExit("comfy-aimdo does not work here: there is no dynamic VRAM.")
    patchers: Any = importlib.import_module("comfy.model_patcher")
    patchers.CoreModelPatcher = patchers.ModelPatcherDynamic
    held: Any = importlib.import_module("comfy.memory_management")
    held.aimdo_enabled = True


def written(args: argparse.Namespace, file: Path, lora: Path) -> None:
    """The model's file, the LoRA's, and an artifact of the model: W8A8, recorded in four steps."""
    write(SHAPES[args.model], file, lora)
    calibrate = importlib.import_module("comfy_nodes.calibration").Calibrate
    model = importlib.import_module("comfy.sd").load_diffusion_model(str(file))
    (good, bad), latent = prompts(args)
    calibrate.execute(
        model, good, bad, {"samples": latent}, ARTIFACT, "W8A8", "quick", "none", 1, 0, 4, 6.0,
        "euler", "normal",
    )  # fmt: skip


def write(shape: dict[str, Any], file: Path, lora: Path) -> None:
    """Random weights in fp16 under the host's names, and a LoRA of its attention and more."""
    import torch
    from safetensors.torch import save_file

    module = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    ops = importlib.import_module("comfy.ops").disable_weight_init
    with torch.device("meta"):
        unet = module.UNetModel(
            image_size=32, out_channels=4, use_spatial_transformer=True, legacy=False,
            dtype=torch.float16, device="meta", operations=ops, **shape,
        )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    state, beside = {}, {}
    for name, old in unet.state_dict().items():
        value = torch.randn(old.shape, generator=draw)
        if old.ndim < 2:
            value = 0.05 * value + float(name.endswith("weight"))
        else:
            value *= 0.7 * old[0].numel() ** -0.5
        state[name] = value.half()
        if len(beside) < 2 * TARGETS and old.ndim == 2 and ".attn" in name:
            base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            low = {"down": (RANK, old.shape[1]), "up": (old.shape[0], RANK)}
            for part, size in low.items():
                weight = torch.randn(size, generator=draw) * 0.3 * size[1] ** -0.5
                beside[f"{base}.lora_{part}.weight"] = weight.half()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)
    keys = importlib.import_module("comfy.utils").unet_to_diffusers(shape | {"legacy": False})
    names = {v.replace(".", "_"): k.replace(".", "_") for k, v in keys.items()}
    save_file({renamed(key, names): value for key, value in beside.items()}, lora)


def renamed(key: str, names: dict[str, str]) -> str:
    """A LoRA's key as trainers write it, which is by diffusers' names."""
    base, rest = key.split(".", 1)
    own = f"{base.removeprefix('lora_unet_')}_weight"
    return f"lora_unet_{names[own].removesuffix('_weight')}.{rest}"


def models(args: argparse.Namespace, file: str, lora: str) -> Iterator[tuple[str, Any]]:
    """The MODEL of each row."""
    sd = importlib.import_module("comfy.sd")
    nodes = importlib.import_module("comfy_nodes.nodes")
    speed = importlib.import_module("comfy_nodes.speed").SpeedUp
    weights = importlib.import_module("comfy.utils").load_torch_file(lora)

    def changed(model: Any) -> Any:
        found, _ = sd.load_lora_for_models(model, None, weights, 0.8, 0)
        assert len(found.patches) == TARGETS, "the LoRA was not taken"
        return found

    if args.child.endswith(LOADER):
        loader = importlib.import_module("comfy_nodes.loader").Loader
        names = f"diffusion_models/{args.model}.safetensors", f"{ARTIFACT}.safetensors"
        made = loader.execute(*names, "nothing", 1.0, execution=args.execution).args[0]
        yield "loader", made
        yield "loader, LoRA", changed(made)
        yield "loader, faster", speed.execute(changed(made), 2.0).args[0]
        return
    plain = sd.load_diffusion_model(file)
    with_lora = changed(plain)

    def quantized(model: Any) -> Any:
        made = nodes.QuantizeModel.execute(model, args.scheme, True, "", None, args.execution)
        return made.args[0]

    yield "plain", plain
    yield "LoRA", with_lora
    yield "quantized", quantized(plain)
    yield "quantized, LoRA", quantized(with_lora)
    yield "faster", speed.execute(quantized(with_lora), 2.0).args[0]
    yield "plain again", plain


def prompts(args: argparse.Namespace) -> tuple[tuple[Any, Any], Any]:
    """Random conditioning of two prompts, and an empty latent."""
    import torch

    draw = torch.Generator().manual_seed(1)
    width, size = SHAPES[args.model]["context_dim"], args.pixels // 8
    pooled = {"pooled_output": torch.randn(1, 1280, generator=draw)}
    good, bad = ([[torch.randn(1, 77, width, generator=draw), pooled]] for _ in range(2))
    return (good, bad), torch.zeros(args.images, 4, size, size)


def sampled(model: Any, args: argparse.Namespace) -> Any:
    """Latents by the host's own sampler: euler, guidance 6."""
    import torch

    (good, bad), latent = prompts(args)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    sample = importlib.import_module("comfy.sample").sample
    out = sample(
        model, noise, args.steps, 6.0, "euler", "normal", good, bad, latent, disable_pbar=True,
        seed=1,
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out


@contextmanager
def watched(device: Any) -> Iterator[list[int]]:
    """Bytes of the card in use, ten times a second; nothing on a CPU."""
    import torch

    found: list[int] = []
    done = threading.Event()

    def look() -> None:
        while device.type == "cuda" and not done.wait(0.1):
            free, whole = torch.cuda.mem_get_info()
            found.append(whole - free)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def far(right: Any, found: Any) -> float:
    """PSNR in dB, of the range that the right latents have."""
    error = float((right - found).square().mean())
    peak = float(right.max() - right.min())
    return 10 * math.log10(peak**2 / error) if error else 200.0


def versions(device: Any) -> dict[str, Any]:
    """What is installed there."""
    import torch

    found = {"ComfyUI": importlib.import_module("comfyui_version").__version__}
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return found | {"torch": torch.__version__, "chip": chip, "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
