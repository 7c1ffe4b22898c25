"""Small videos in the layout of DAVIS. The scores of the original in test_eval_video_segmentation.py were measured on them."""

from pathlib import Path

import numpy as np
from PIL import Image

from clever.evaluation.video.masks import write_mask

COLOURS = np.array([(30, 60, 30), (220, 40, 40), (40, 60, 230)])  # background, two objects


def write_labels(labels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(labels, path)


def write_video(
    root: Path, name: str, frames=8, step=(0, 4), jump=None, objects=2, height=96, width=160, side=32, first=0
) -> None:
    """Squares on green, in noise: object 1 moves `step` (rows, columns) per frame, object 2 the other way.

    `jump` is (frame, x): from that frame on, object 1 is at x. Frames are numbered from `first` on.
    """
    rng = np.random.default_rng(0)
    folder = root / "JPEGImages/480p" / name
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(frames):
        labels = np.zeros((height, width), np.uint8)
        for i in range(objects):
            sign = 1 - 2 * i
            y = 8 + i * (side + 8) + sign * step[0] * t
            x = (8 if i == 0 else width - 8 - side) + sign * step[1] * t
            if jump and i == 0 and t >= jump[0]:
                x = jump[1]
            labels[y : y + side, x : x + side] = i + 1
        pixels = COLOURS[labels] + rng.integers(-6, 7, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{first + t:05}.jpg", quality=95)
        write_labels(labels, root / "Annotations/480p" / name / f"{first + t:05}.png")


def write_list(root: Path, *names: str, subset: str = "val") -> None:
    path = root / "ImageSets/2017" / f"{subset}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_davis(root: Path) -> Path:
    """The four videos on which the original was scored."""
    write_video(root, "two-squares")
    write_video(root, "static", frames=5, step=(0, 0))
    write_video(root, "fast", frames=7, step=(0, 0), jump=(3, 120), objects=1)
    write_video(root, "unaligned", step=(1, 3))
    write_list(root, "two-squares", "static", "fast", "unaligned")
    return root
