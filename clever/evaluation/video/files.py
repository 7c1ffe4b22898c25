"""Reading and writing video files: GIF with Pillow, all other formats with PyAV, which is optional."""

import importlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageSequence

from clever import utils
from clever.data.files import DECODE_ERRORS, read_image
from clever.utils import InputError

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")  # that are read
MIN_FPS, MAX_FPS, MAX_GIF_FPS = 0.01, 1000, 100  # a GIF counts in hundredths of a second
FORMATS = ("mp4", "avi", "gif")  # that are written
DEFAULT_FPS = 30.0


def import_pyav() -> ModuleType:
    """PyAV, the Python bindings of FFmpeg. Raises InputError if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise InputError(
            "all video formats except GIF need PyAV (pip install av); without it, use a folder of frames as input and "
            "--video_format gif"
        ) from error


def extract_frames(video: Path, folder: Path) -> tuple[list[str], float]:
    """Write all frames to <folder>/frame-0000.png ...; returns their paths and the number of frames per second.

    Raises InputError if the video cannot be read or has no frames.
    """
    paths = []
    with utils.error_prefix(f"--image_path {video}"):
        for image, rate in _read_gif(video) if video.suffix.lower() == ".gif" else _read_with_pyav(video):
            paths.append(str(folder / f"frame-{len(paths):04}.png"))
            utils.save_png(np.asarray(image), Path(paths[-1]))
            fps = rate
        if not paths:
            raise InputError("has no frames")
    return paths, fps


def _read_gif(path: Path) -> Iterator[tuple[Image.Image, float]]:
    try:
        with Image.open(path) as video:
            fps = 1000 / (video.info.get("duration") or 1000 / DEFAULT_FPS)  # duration is in milliseconds
            for frame in ImageSequence.Iterator(video):
                yield frame.convert("RGB"), fps
    except DECODE_ERRORS as error:
        raise InputError(f"cannot be read ({error})") from error


def _read_with_pyav(path: Path) -> Iterator[tuple[Image.Image, float]]:
    av = import_pyav()
    try:
        with av.open(str(path)) as container:
            for stream in container.streams.video[:1]:
                fps = float(stream.average_rate or DEFAULT_FPS)
                for frame in container.decode(stream):
                    turn = getattr(frame, "rotation", 0)  # in degrees; how a phone was held. FFmpeg does not turn the frame
                    yield frame.to_image().rotate(turn, expand=True), fps
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"cannot be read ({error})") from error


def write_video(pictures: list[Path], path: Path, fps: float) -> None:
    """Write pictures as a video in the size of the first one, rounded down to even numbers, which H.264 requires.

    Raises InputError if PyAV is needed and not installed, or if it cannot write the video.
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
    try:
        with av.open(str(path), "w", format=container_format) as container:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise InputError(f"--video_format {container_format}: the video cannot be written ({error})") from error
