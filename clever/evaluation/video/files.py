"""Reading and writing videos with PyAV, which is optional; a GIF is written without it."""

import importlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from clever import utils
from clever.data.files import read_image
from clever.evaluation.images import save_png
from clever.utils import InputError

FORMATS = ("mp4", "avi", "gif")  # that are written
DEFAULT_FPS = 30.0


def import_pyav() -> ModuleType:
    """PyAV, the Python bindings of FFmpeg. Raises InputError if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise InputError("videos need PyAV (pip install av), except a folder of frames with --video_format gif") from error


def extract_frames(video: Path, folder: Path) -> tuple[list[str], float]:
    """Write all frames to <folder>/frame-0000.png ...; returns their paths and the number of frames per second.

    Raises InputError if PyAV is not installed or the video cannot be read.
    """
    paths, av = [], import_pyav()
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                # How a phone was held, in degrees; FFmpeg does not turn the frame.
                picture = frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
                paths.append(str(folder / f"frame-{len(paths):04}.png"))
                save_png(np.asarray(picture), paths[-1])
            return paths, float(stream.average_rate or DEFAULT_FPS)
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: there is no stream of pictures
        raise InputError(f"--image_path {video}: is not a video that can be read ({error})") from error


def write_video(pictures: list[Path], path: Path, fps: float) -> None:
    """Write pictures as a video in the size of the first one, rounded down to even numbers, which H.264 requires.

    Raises InputError if PyAV is needed and not installed.
    """
    W, H = read_image(pictures[0]).size
    size = (W - W % 2, H - H % 2)
    frames = (read_image(picture).resize(size, Image.Resampling.NEAREST) for picture in pictures)
    with utils.atomic_file(path) as temporary:
        if path.suffix == ".gif":
            next(frames).save(temporary, format="GIF", save_all=True, append_images=frames, duration=1000 / fps, loop=0)
        else:
            _write_with_pyav(frames, size, temporary, path.suffix[1:], fps)


def _write_with_pyav(
    frames: Iterator[Image.Image], size: tuple[int, int], path: Path, container_format: str, fps: float
) -> None:
    av = import_pyav()
    with av.open(str(path), "w", format=container_format) as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
