"""The contact sheet of the video evaluation: frames of every video with their masks."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clever.data.files import read_image
from clever.evaluation.video.davis import Video
from clever.evaluation.video.masks import palette, read_labels


def draw_mask(frame: Image.Image, labels: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """A frame with its objects in their palette colours, each with a white outline."""
    pixels, colours = np.asarray(frame).astype(np.float32), palette()[labels]
    drawn = np.where((labels > 0)[..., None], (1 - opacity) * pixels + opacity * colours, pixels)
    padded = np.pad(labels, 1, mode="edge")
    neighbours = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])  # 4, H, W
    drawn[(labels > 0) & (neighbours != labels).any(0)] = 255
    return Image.fromarray(drawn.round().astype(np.uint8))


def contact_sheet(
    videos: list[tuple[Video, Path, str]], columns: int = 6, height: int = 120, font_size: int = 14
) -> np.ndarray:
    """One row per (video, folder of its masks, caption): evenly spaced frames from the first to the last; RGB.

    Raises InputError if a frame or mask cannot be read.
    """
    font, gap = ImageFont.load_default(font_size), 4
    rows = [(caption, _cells(video, folder, columns, height)) for video, folder, caption in videos]
    caption_height = font_size + 2 * gap
    width = max(sum(cell.width + gap for cell, _ in cells) for _, cells in rows) + gap
    sheet = Image.new("RGB", (width, len(rows) * (caption_height + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, cells) in enumerate(rows):
        left, top = gap, row * (caption_height + height + gap)
        draw.text((left, top + gap), caption, "black", font)
        for cell, name in cells:
            sheet.paste(cell, (left, top + caption_height))
            corner = left + gap, top + caption_height + height - gap
            draw.text(corner, name, "white", font, anchor="ls", stroke_width=1, stroke_fill="black")
            left += cell.width + gap
    return np.asarray(sheet)


def _cells(video: Video, folder: Path, columns: int, height: int) -> list[tuple[Image.Image, str]]:
    """Frames of a video with their masks, and their names."""
    cells = []
    for i in np.unique(np.linspace(0, len(video.frames) - 1, columns).round().astype(int)):
        frame = read_image(video.frames[i])
        size = max(1, round(frame.width * height / frame.height)), height
        labels = Image.fromarray(read_labels(folder / video.mask_names[i])).resize(size, Image.Resampling.NEAREST)
        cells.append((draw_mask(frame.resize(size), np.asarray(labels)), video.frames[i].stem))
    return cells
