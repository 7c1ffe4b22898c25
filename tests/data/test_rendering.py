"""The readable renderer, operation by operation beside Pillow and torchvision; the choice of a renderer."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from support.pictures import photo, view_of
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from clever.data import rendering
from clever.data.rendering import JITTER_ORDERS, render_view
from clever.utils import InputError

SIZE = 48
GOLDEN_NOISE = [0.59936655, 0.95530933, -0.62264407]  # first numbers of rendering.elastic_noise(7, 2)


def render(image, size=SIZE, **changes):
    """The view as a Pillow image."""
    pixels = render_view(np.array(image), view_of(image.height, image.width, size, **changes)[0])
    assert pixels.dtype == np.uint8 and pixels.shape[0] == 3
    return Image.fromarray(pixels.transpose(1, 2, 0).copy())


@pytest.fixture
def image():
    return photo(SIZE, SIZE)


def assert_equal(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("bicubic", [0, 1])
def test_crop_and_resize_are_pillows(bicubic):
    image = photo(120, 90)
    found = render_view(np.array(image), view_of(70, 80, 32, top=10, left=20, bicubic=bicubic)[0])
    mode = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    expected = np.asarray(image.crop((20, 10, 100, 80)).resize((32, 32), mode)).transpose(2, 0, 1)
    assert np.abs(found.astype(int) - expected).max() <= 1  # torchvision rounds otherwise than Pillow


def test_a_window_is_cut_out_of_the_resized_box():
    image = photo(120, 90)
    view = view_of(90, 120, 32, resized_height=48, resized_width=64, y=8, x=16)[0]
    found = render_view(np.array(image), view)
    whole = v2.Resize(48, v2.InterpolationMode.BICUBIC, antialias=True)(F.pil_to_tensor(image))
    assert_equal(found, whole[:, 8:40, 16:48])


def test_flip_rotation_grey_and_solarize_are_exact(image):
    assert_equal(render(image), image)
    assert_equal(render(image, flip=1), ImageOps.mirror(image))
    assert_equal(render(image, angle=33.5), image.rotate(33.5))
    assert_equal(render(image, angle=90), image.rotate(90))
    assert_equal(render(image, grey=1), image.convert("L").convert("RGB"))
    assert_equal(render(image, solarize=1), ImageOps.solarize(image, 128))
    assert_equal(render(image, blur=1.3), image.filter(ImageFilter.GaussianBlur(1.3)))


@pytest.mark.parametrize("order", [0, 7, 23])
def test_jitter_in_its_order_by_hand(image, order):
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.08}
    expected = image
    operations = [
        lambda p: ImageEnhance.Brightness(p).enhance(1.3),
        lambda p: ImageEnhance.Contrast(p).enhance(0.7),
        lambda p: ImageEnhance.Color(p).enhance(1.2),
        lambda p: F.adjust_hue(p, 0.08),
    ]
    for index in JITTER_ORDERS[order]:
        expected = operations[index](expected)
    found = np.asarray(render(image, jitter=1, order=order, **factors)).astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 1  # factors are float32 in a view
    assert_equal(render(image, jitter=0, order=order, **factors), image)


def test_operations_come_in_their_order(image):
    """Blur after grey, solarise last; elastic distortion before or after the colours."""
    expected = ImageOps.solarize(image.convert("L").convert("RGB").filter(ImageFilter.GaussianBlur(2)), 128)
    assert_equal(render(image, grey=1, blur=2, solarize=1), expected)
    elastic = {"elastic_alpha": 200, "elastic_seed": 5, "contrast": 0.5}
    corner = [np.asarray(render(image, jitter=jitter, **elastic)) for jitter in (1, 2)]
    outside = (np.asarray(render(image, **elastic)) == 0).all(-1)
    assert outside.any() and (corner[1][outside] == 0).all() and (corner[0][outside] > 0).all()


def test_elastic_noise_is_uniform_and_golden():
    noise = rendering.elastic_noise(7, 96)
    assert noise.shape == (2, 96, 96) and noise.dtype == np.float32
    assert noise.min() >= -1 and noise.max() <= 1 and abs(noise.mean()) < 0.02 and abs(noise.std() - 3**-0.5) < 0.01
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[0].ravel(), rendering.elastic_noise(8, 96)[0].ravel())[0, 1]) < 0.03
    assert np.allclose(rendering.elastic_noise(7, 2).ravel()[:3], GOLDEN_NOISE, atol=1e-7)


def test_elastic_distortion_is_torchvisions(monkeypatch):
    """The field that ElasticTransform makes of the same noise, and its image."""
    image, noise = photo(96, 96), rendering.elastic_noise(3, 96)
    directions = iter(torch.from_numpy((noise + 1) / 2))
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: next(directions).reshape(shape))
    expected = v2.ElasticTransform(alpha=100.0, sigma=5.0)(F.pil_to_tensor(image))
    found = F.pil_to_tensor(render(image, size=96, elastic_alpha=100, elastic_seed=3))
    assert (found.int() - expected.int()).abs().max() <= 1 and not torch.equal(found, F.pil_to_tensor(image))


@pytest.mark.parametrize("size", [1, 2, 16, 21])
def test_smoothing_reflects_as_often_as_needed(size):
    """Padding longer than the side (20 for sigma 5) is reflected repeatedly, as in numpy.pad."""
    noise = np.random.default_rng(0).standard_normal(size)
    taps = np.exp(-0.5 * (np.arange(-20, 21) / 5.0) ** 2)
    expected = np.convolve(np.pad(noise, 20, mode="reflect"), taps / taps.sum(), mode="valid")
    smoothed = rendering.smoothing_matrix(size, 5.0).double().numpy() @ noise
    np.testing.assert_allclose(smoothed, expected, atol=1e-6)


def test_the_choice_says_why(monkeypatch):
    monkeypatch.setattr(rendering.rendering_cpp, "unavailable_reason", lambda: "no compiler here")
    assert rendering.choose_renderer("auto") == rendering.choose_renderer("torchvision") == "torchvision"
    assert "no compiler here" in rendering.renderer_line("torchvision")
    with pytest.raises(InputError, match="--views cpp: no compiler here"):
        rendering.choose_renderer("cpp")
    monkeypatch.setattr(rendering.rendering_cpp, "unavailable_reason", lambda: None)
    assert [rendering.choose_renderer(name) for name in ("auto", "cpp", "torchvision")] == ["cpp", "cpp", "torchvision"]
    assert "cpp" in rendering.renderer_line("cpp") and "--views cpp" in rendering.renderer_line("torchvision")
