"""Segmentation of a video: the labels of its first frame, propagated by the patch features of a frozen ViT.

Shapes: n number of objects.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from clever.evaluation.video import davis
from clever.evaluation.video.davis import Video
from clever.evaluation.video.masks import one_hot_labels, read_labels, soft_labels_to_mask
from clever.evaluation.video.propagation import Propagation
from clever.utils import InputError

READING_THREADS = 2
SETTINGS_FILE = "settings.json"  # beside the masks of a video: what they depend on


@dataclass
class Segmenter:
    """A frozen ViT, the normalisation of its input, and the settings of the propagation (see Propagation)."""

    backbone: nn.Module
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int = davis.SHORT_SIDE  # pixels
    n_last_frames: int = 7
    radius: int = 12  # patches
    topk: int = 5
    memory_mb: float = 256
    batch_size: int = 1  # frames

    @torch.inference_mode()
    def segment(self, video: Video) -> Iterator[np.ndarray]:
        """Labels [H, W] of every frame after the first, whose labels are the annotation.

        Raises InputError if a file cannot be read.
        """
        patch_size = self.backbone.patch_embed.patch_size
        h, w = davis.network_size(video.size, patch_size, self.short_side)
        labels = one_hot_labels(read_labels(video.annotations[0]), (h // patch_size, w // patch_size))  # rows, columns, 1 + n
        features = self.frame_features(video)
        settings = self.n_last_frames, self.radius, self.topk, self.memory_mb
        propagation = Propagation(next(features), labels.to(self.device), *settings)
        for feature in features:
            soft = propagation.step(feature)  # rows, columns, 1 + n
            yield soft_labels_to_mask(soft, patch_size, video.size)

    @torch.inference_mode()
    def frame_features(self, video: Video) -> Iterator[Tensor]:
        """Patch tokens [rows, columns, D] of the last block, after the final norm, frame by frame.

        Raises FloatingPointError if they are not finite.
        """
        patch_size = self.backbone.patch_embed.patch_size
        size = davis.network_size(video.size, patch_size, self.short_side)
        frames = read_ahead(lambda path: davis.read_frame(path, size, self.mean, self.std), video.frames)
        while batch := list(islice(frames, self.batch_size)):
            images = torch.stack(batch).to(self.device)  # B, 3, h, w
            tokens = self.backbone.get_intermediate_layers(images, 1)[0][:, 1:]  # B, rows*columns, D
            if not tokens.isfinite().all():
                raise FloatingPointError(f"features of video {video.name}")
            yield from rearrange(tokens, "B (rows columns) D -> B rows columns D", rows=size[0] // patch_size)


def read_ahead(read: Callable[[Path], Tensor], paths: list[Path]) -> Iterator[Tensor]:
    """The frames in order; threads read the next ones while the current one is used."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        pending: deque = deque()
        for path in paths:
            pending.append(pool.submit(read, path))
            if len(pending) > READING_THREADS:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def is_finished(folder: Path, video: Video, settings: dict[str, Any]) -> bool:
    """Whether the folder contains all masks of the video, made with these settings.

    Raises InputError if the folder exists and was not written by this evaluation.
    """
    if not folder.exists():
        return False
    try:
        same = json.loads((folder / SETTINGS_FILE).read_text()) == settings
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: exists, but was not written by this script (no valid {SETTINGS_FILE}); move it away"
        ) from error
    return same and all((folder / name).is_file() for name in video.mask_names)
