"""What the parts of a calibration take, in calls of a denoiser with one image.

Progress goes by it, and so does `check`, before anything runs. Guidance makes two calls of each, in
all parts alike.
"""

from __future__ import annotations

PASSES = 2  # over what was recorded, where rounding looks at inputs: in float, and quantized
NEAREST = 2  # recorded calls that rounding to nearest takes about as long as
PLAIN = 3  # calls in full precision that trials are compared with
USUAL = 3 * 16  # calls of a search for layers that stay in float: 12 to 22 trials of three calls
RESULT = 6  # calls of the check of the result: three in full precision, three quantized
SPEEDUPS = (1.4, 2.0, 2.5)  # at which a forecast is measured
COUNT = 4  # images that it is measured on


def images_of(steps: int) -> int:
    """Calls of the denoiser times images that measuring a forecast takes, at so many steps."""
    return round(COUNT * steps * (1 + sum(1 / speedup for speedup in SPEEDUPS)))


def layer_costs(
    recorded: int, batch: int, *, replays: bool, stored: bool, search: bool
) -> dict[str, int]:
    """What each part of a denoiser's quantization takes, in the order in which they are done.

    recorded: calls with one image that a recording has, made with `batch` images each. replays:
    whether rounding looks at them; stored: whether ranges of activations do. search: whether layers
    are looked for that are better left in float.
    """
    return {
        "layers": NEAREST * batch + (PASSES * recorded if replays else 0),
        "ranges": recorded if stored else 0,
        "kept": (PLAIN + USUAL) * batch if search else 0,
        "result": RESULT * batch,
    }
