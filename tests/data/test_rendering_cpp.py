"""The compiled renderer of views (csrc/views) against the readable one (rendering.render_view)."""

import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_sample_images
from support.pictures import view_of
from support.processes import ROOT

from clever.data import rendering_cpp
from clever.data.augmentations import MultiCropAugmentation
from clever.data.rendering import render_view
from csrc import build_tool
from csrc.build_tool import VIEWS, BuildError

OPERATION_BOUND, RECIPE_BOUND = 1.5, 2.5  # mean absolute difference, of 255


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with a build of the present sources."""
    in_place = VIEWS.folder / VIEWS.package
    if build_tool.is_up_to_date(VIEWS, in_place, os.environ):
        return in_place
    try:
        build_tool.find_compiler(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("views")
    build_tool.build(VIEWS, folder, os.environ)
    return folder


@pytest.fixture
def use(monkeypatch):
    """use(folder, ...): the loader searches only there."""

    def search(*folders):
        monkeypatch.setattr(rendering_cpp.VIEWS, "build_folders", lambda: list(folders))
        monkeypatch.setattr(rendering_cpp.VIEWS, "found", {})
        rendering_cpp._function.cache_clear()

    yield search
    rendering_cpp._function.cache_clear()


@pytest.fixture
def compiled(use, built):
    """compiled(image, views): the views by the compiled renderer."""
    use(built)
    return render


def render(image, views):
    outputs = [np.full((3, view["size"], view["size"]), 77, np.uint8) for view in views]
    rendering_cpp.render(image, views, addresses(outputs))
    return outputs


def addresses(outputs):
    """Of the memory of contiguous arrays, uint64 [V]."""
    assert all(output.flags.c_contiguous for output in outputs)
    return np.array([output.ctypes.data for output in outputs], np.uint64)


@pytest.fixture(scope="session")
def photographs():
    """Two photographs, uint8 [427, 640, 3]."""
    return [image.copy() for image in load_sample_images().images]


def recipe(seeds, aug="aug1_4_2", height=427, width=640):
    """Views as a training recipe draws them, VIEW [10 for each seed]; all have the same size."""
    views = MultiCropAugmentation(aug, local_crops_scale=(0.05, 1.0), global_crops_size=96)
    return views.draw_seeded(seeds, [height] * len(seeds), [width] * len(seeds)).ravel()


def difference(image, view, compiled):
    """Absolute difference between the renderers, int [3, S, S]."""
    return np.abs(compiled(image, view)[0].astype(int) - render_view(image, view[0]).astype(int))


@pytest.mark.parametrize(
    "changes",
    [
        {"top": -1}, {"height": 0}, {"width": 2**31 - 1}, {"y": 1}, {"order": 24}, {"angle": np.nan}, {"blur": 33},
    ],
)  # fmt: skip
def test_invalid_views_are_refused_before_anything_is_rendered(compiled, changes):
    image = np.zeros((10, 12, 3), np.uint8)
    views = np.concatenate([view_of(10, 12, 8), view_of(10, 12, 8, **changes)])
    first = np.full((3, 8, 8), 77, np.uint8)
    with pytest.raises(ValueError, match="view 1 is invalid for an image of 10 x 12 pixels: .*'top': .*'blur': "):
        rendering_cpp.render(image, views, addresses([first, first]))
    assert (first == 77).all()


JITTERED = {"jitter": 1, "order": 5}
OPERATIONS = [
    {}, {"bicubic": 0}, {"top": 200, "left": 300, "height": 60, "width": 75},
    {"top": 200, "left": 300, "height": 1, "width": 1}, {"resized_height": 256, "resized_width": 384, "y": 16, "x": 80},
    {"angle": -37.5}, {"elastic_alpha": 100, "elastic_seed": 2**32 - 1},
    {"elastic_alpha": 150, "elastic_seed": 7, "jitter": 2, "brightness": 1.3}, {**JITTERED, "brightness": 1.4},
    {**JITTERED, "contrast": 1.4}, {**JITTERED, "saturation": 0.6}, {**JITTERED, "hue": -0.1}, {**JITTERED, "hue": 0.5},
    {"blur": 0.1}, {"blur": 0.7}, {"blur": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("changes", OPERATIONS)
def test_each_operation_agrees(compiled, photographs, changes):
    for image, size in zip(photographs, (224, 224 if "x" in changes else 25), strict=True):
        assert difference(image, view_of(427, 640, size, **changes), compiled).mean() <= OPERATION_BOUND


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"flip": 1}, {"grey": 1}, {"solarize": 1}, {"angle": 90}, {"angle": -90}, {"angle": 180}, {"angle": 33.3},
        {"angle": 1e-3}, {"angle": 45, "flip": 1, "grey": 1, "solarize": 1},
    ],
)  # fmt: skip
def test_operations_without_interpolation_are_exact(compiled, photographs, changes):
    """The box has the size of the view, so nothing is resampled."""
    for image, size in zip(photographs, (224, 63), strict=True):
        assert difference(image, view_of(size, size, size, top=100, left=200, **changes), compiled).max() == 0


def test_the_orders_of_the_jitter_agree(compiled, photographs):
    for order in range(24):
        view = view_of(427, 640, 96, jitter=1, order=order, brightness=0.7, contrast=1.4, saturation=1.3, hue=0.1)
        assert difference(photographs[0], view, compiled).mean() <= OPERATION_BOUND, order


@pytest.mark.parametrize("aug", ["aug1_2", "aug1_4_2"])
def test_whole_recipes_agree(compiled, photographs, aug):
    for image in photographs:
        views = recipe([0, 1], aug)
        pairs = zip(compiled(image, views), views, strict=True)
        means = [np.abs(pixels.astype(int) - render_view(image, view)).mean() for pixels, view in pairs]
        assert np.mean(means) <= OPERATION_BOUND and max(means) <= RECIPE_BOUND


ODD = [
    ((1, 1), {}), ((1, 4000), {}), ((4000, 1), {}), ((300, 21), {}), ((7, 5), {"top": 6, "left": 4, "height": 1, "width": 1}),
    ((40, 50), {"top": 39, "height": 1}), ((40, 50), {"left": 49, "width": 1}),
    ((40, 50), {"top": 20, "left": 25, "height": 20, "width": 25}),
]  # fmt: skip


def odd_views(shape, changes, sizes=(1, 2, 3, 16, 33)):
    everything = {"flip": 1, "angle": 30, "elastic_alpha": 100, "elastic_seed": 3, **JITTERED, "hue": 0.05, "blur": 1.5}
    settings = [{}, {"bicubic": 0}, {"angle": 90}, {"angle": 90.5}, {"elastic_alpha": 100}, {"blur": 1}, everything]
    views = np.concatenate([view_of(*shape, size, **changes, **setting) for size in sizes for setting in settings])
    views["blur"][views["size"] < 16] = 0  # where nearly every pixel is at the border, see blur.h
    return views


@pytest.mark.parametrize(("shape", "changes"), ODD)
def test_odd_input_agrees(compiled, shape, changes):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    views = odd_views(shape, changes)
    for view, pixels in zip(views, compiled(image, views), strict=True):
        assert np.abs(pixels.astype(int) - render_view(image, view)).mean() <= RECIPE_BOUND, view


def test_the_same_call_gives_the_same_bits(compiled, photographs):
    views = recipe([2])
    first = compiled(photographs[0], views)
    compiled(photographs[1], odd_views((40, 50), {}))
    alone = [compiled(photographs[0], views[i : i + 1])[0] for i in range(10)]
    assert np.array_equal(first, compiled(photographs[0], views)) and np.array_equal(first, alone)


def test_instruction_sets_agree(built, use, photographs, tmp_path, monkeypatch):
    """Without hue and solarise, which can make much of a rounding."""
    views = recipe([3, 4])
    views["solarize"] = views["hue"] = 0
    rendered = {}
    for isa in ("baseline", "avx2", "avx512"):
        folder = shutil.copytree(built, tmp_path / isa)  # another file is loaded anew and reads the environment
        monkeypatch.setenv("VIEWS_ISA", isa)
        use(folder)
        if rendering_cpp.instruction_set() == isa:
            rendered[isa] = np.stack(render(photographs[0], views)).astype(int)
    baseline = rendered.pop("baseline")
    for pixels in rendered.values():
        assert np.abs(pixels - baseline).max() <= 2 and (pixels != baseline).mean() < 0.01


SANITIZED = """
import pickle, sys
from pathlib import Path
import numpy as np
from clever.data import rendering_cpp
rendering_cpp.VIEWS.in_place = Path(sys.argv[1])
for image, views in pickle.loads(Path(sys.argv[2]).read_bytes()):
    outputs = [np.empty((3, size, size), np.uint8) for size in views["size"]]
    rendering_cpp.render(image, views, np.array([output.ctypes.data for output in outputs], np.uint64))
print("rendered", rendering_cpp.instruction_set())
"""


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    """Odd sizes, and extreme but valid parameters, in every instruction set that this processor has."""
    try:
        compiler = build_tool.find_compiler(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    runtime = build_tool.run([*compiler, "-print-file-name=libasan.so"]).strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{compiler[0]} has no AddressSanitizer")
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    build_tool.build(VIEWS, tmp_path / VIEWS.package, {**os.environ, "CXX": f"{' '.join(compiler)} {flags}"})
    extreme = {"jitter": 1, "brightness": 1e6, "contrast": -1e6, "saturation": 1e6, "hue": -0.5, "angle": 1e6, "blur": 32}
    cases = [(shape, odd_views(shape, changes)) for shape, changes in ODD]
    cases += [((61, 73), view_of(61, 73, size, elastic_alpha=-1e6, **extreme)) for size in (1, 7, 64, 300)]
    cases += [((61, 73), recipe(range(5), height=61, width=73))]
    random = np.random.default_rng(0)
    cases = [(random.integers(0, 256, (*shape, 3), np.uint8), views) for shape, views in cases]
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    environ = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    for isa in ("baseline", "avx2", "avx512"):
        command = [sys.executable, "-c", SANITIZED, str(tmp_path / VIEWS.package), str(tmp_path / "cases")]
        result = subprocess.run(command, env=environ | {"VIEWS_ISA": isa}, capture_output=True, text=True)
        assert result.returncode == 0 and "rendered" in result.stdout, result.stderr[:3000]
