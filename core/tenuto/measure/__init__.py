"""What an artifact costs and what it buys, measured."""

from .bf16 import NATIVE, bf16_arithmetic, bf16_copy
from .compare import ARTIFACT, BF16, FIRST_SEED, FULL, compare, compare_all
from .comparison import Comparison
from .encoder_states import states_distance
from .lpips import lpips
from .memory import resident_weight_bytes
from .metrics import frechet_distance, kernel_distance, psnr, ssim
from .paired_runs import first_call

__all__ = [
    "ARTIFACT",
    "BF16",
    "FIRST_SEED",
    "FULL",
    "NATIVE",
    "Comparison",
    "bf16_arithmetic",
    "bf16_copy",
    "compare",
    "compare_all",
    "first_call",
    "frechet_distance",
    "kernel_distance",
    "lpips",
    "psnr",
    "resident_weight_bytes",
    "ssim",
    "states_distance",
]
