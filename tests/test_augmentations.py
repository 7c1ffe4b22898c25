"""Training views and perturbations: operations, their order, probabilities and parameter ranges over seeded draws."""

import inspect
import random
from collections import defaultdict
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

import augmentations
from augmentations import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PERTURBATIONS,
    RECIPES,
    ElasticTransform,
    MultiCropAugmentation,
    check_crop_scale,
    eval_transform,
    probe_train_transform,
    smoothing_matrix,
)
from utils import InputError

JITTER = ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"]
ORDER = ["resized_crop", "horizontal_flip", "rotate", "elastic", "jitter", "rgb_to_grayscale", "blur", "solarize"]
DRAWS = 160

signature = lru_cache(inspect.signature)


def photo(width=80, height=60, seed=0):
    """A smooth colourful image with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-10, 11, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def to_pixels(tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Undo the normalisation: [3, H, W] float -> [H, W, 3] uint8; fails unless these were whole grey levels."""
    grey = 255 * (tensor * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
    assert (grey - grey.round()).abs().max() < 1e-3
    return grey.round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture
def events(monkeypatch):
    """Records what the pipelines do: a growing list of (operation, its parameters)."""
    seen = []
    call_kernel = v2.Transform._call_kernel
    elastic_forward, blur_filter = ElasticTransform.forward, augmentations.ImageFilter.GaussianBlur

    def record_kernel(self, functional, image, *args, **kwargs):
        parameters = dict(signature(functional).bind(image, *args, **kwargs).arguments)
        if "interpolation" in parameters:  # some versions pass the name of the mode
            parameters["interpolation"] = InterpolationMode(parameters["interpolation"])
        seen.append((functional.__name__, {k: v for k, v in parameters.items() if k not in ("inpt", "image")}))
        return call_kernel(self, functional, image, *args, **kwargs)

    def record_elastic(self, image):
        seen.append(("elastic", {"alpha": self.alpha, "sigma": self.sigma}))
        return elastic_forward(self, image)

    def record_blur(radius):
        seen.append(("blur", {"radius": radius}))
        return blur_filter(radius)

    monkeypatch.setattr(v2.Transform, "_call_kernel", record_kernel)
    monkeypatch.setattr(ElasticTransform, "forward", record_elastic)
    monkeypatch.setattr(augmentations.ImageFilter, "GaussianBlur", record_blur)
    return seen


def seed_draw(index):
    """Seed as ImageDataset does: the statistics need independent draws."""
    torch.manual_seed(int(np.random.SeedSequence((0, 0, index)).generate_state(1)[0]))


def views_of(events):
    """The events of each view: a view begins with its crop."""
    starts = [i for i, (name, _) in enumerate(events) if name == "resized_crop"] + [len(events)]
    return [events[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def assert_share(count, total, probability):
    """Within four standard deviations of a binomial (exactly, for probabilities 0 and 1)."""
    deviation = (probability * (1 - probability) / total) ** 0.5
    assert abs(count / total - probability) <= 4 * deviation, (count, total, probability)


def assert_uniform(values, low, high):
    """All values lie in the range, and pass a Kolmogorov-Smirnov test at a level of about 0.1 %."""
    values = np.sort(values)
    assert low <= values[0] and values[-1] <= high
    expected = (values - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    assert max((steps[1:] - expected).max(), (expected - steps[:-1]).max()) < 1.95 / len(values) ** 0.5


def parameters(events, operation):
    return [chosen for name, chosen in events if name == operation]


def assert_jitter(events, saturation):
    """Ranges of the colour jitter; `saturation` is the largest change of its factor."""
    limits = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "hue": (-0.1, 0.1)}
    limits["saturation"] = (1 - saturation, 1 + saturation)
    for name, (low, high) in limits.items():
        assert_uniform([chosen[f"{name}_factor"] for chosen in parameters(events, f"adjust_{name}")], low, high)


def assert_rotations(events, limit):
    """Angles within +-limit degrees, nearest pixels, black corners."""
    rotations = parameters(events, "rotate")
    assert_uniform([chosen["angle"] for chosen in rotations], -limit, limit)
    assert {chosen["interpolation"] for chosen in rotations} == {InterpolationMode.NEAREST}
    assert not any(np.any(chosen.get("fill", 0)) for chosen in rotations)


# --- training views --------------------------------------------------------------------------------------------------

KINDS = ("global1", "global2", "local", "local")  # of the views of an image
PROBABILITIES = {  # of the operations that depend on the kind of view
    "global1": {"blur": 1.0, "solarize": 0.0},
    "global2": {"blur": 0.1, "solarize": 0.2},
    "local": {"blur": 0.5, "solarize": 0.0},
}


@pytest.mark.parametrize(("aug", "rotation", "elastic_p"), [("aug1", 0, 0), ("aug1_2", 90, 0), ("aug1_4_2", 90, 0.5)])
def test_training_views_follow_the_recipe(events, aug, rotation, elastic_p):
    augment = MultiCropAugmentation(aug, local_crops_number=2, global_crops_size=24, local_crops_size=16)
    image = photo(120, 120)
    for seed in range(DRAWS):
        seed_draw(seed)
        augment(image)
    views = views_of(events)
    assert len(views) == 4 * DRAWS
    assert_operations(views, {"rotate": float(rotation > 0), "elastic": elastic_p})
    assert_crops(views, 120)
    assert_jitter(events, saturation=0.2)
    orders = {tuple(name for name, _ in view if name in JITTER) for view in views} - {()}
    assert len(orders) == 24
    assert_uniform([chosen["radius"] for chosen in parameters(events, "blur")], 0.1, 2.0)
    assert {chosen["threshold"] for chosen in parameters(events, "solarize")} == {128}
    if rotation:
        assert_rotations(events, rotation)
    if elastic_p:
        assert {(chosen["alpha"], chosen["sigma"]) for chosen in parameters(events, "elastic")} == {(100.0, 5.0)}


def assert_operations(views, probabilities):
    """Order and probabilities of the operations; `probabilities` are those of the recipe."""
    common = {"resized_crop": 1.0, "horizontal_flip": 0.5, "jitter": 0.8, "rgb_to_grayscale": 0.2}
    counts = {kind: defaultdict(int) for kind in PROBABILITIES}
    for i, view in enumerate(views):
        names = ["jitter" if name in JITTER else name for name, _ in view]
        assert names == sorted(names, key=ORDER.index)
        assert names.count("jitter") in (0, 4)
        for name in set(names):
            counts[KINDS[i % 4]][name] += 1
    for kind, own in PROBABILITIES.items():
        for name, probability in (common | probabilities | own).items():
            assert_share(counts[kind][name], len(views) * KINDS.count(kind) // 4, probability)


def assert_crops(views, side):
    """Sizes, areas, aspect ratios and interpolation of the crops from images of side x side pixels."""
    crops = [view[0][1] for view in views]
    assert [tuple(crop["size"]) for crop in crops] == [(24, 24), (24, 24), (16, 16), (16, 16)] * (len(views) // 4)
    area = np.array([crop["height"] * crop["width"] / side**2 for crop in crops]).reshape(-1, 4)
    assert 0.39 < area[:, :2].min() < 0.45 and 0.9 < area[:, :2].max() <= 1
    assert_uniform(area[:, 2:].ravel(), 0.048, 0.403)  # small crops always fit, so none is rejected
    ratio = np.array([crop["width"] / crop["height"] for crop in crops])
    assert 0.7 < ratio.min() < 0.8 and 1.27 < ratio.max() < 1.4  # 3/4 to 4/3, in whole pixels
    assert {crop["interpolation"] for crop in crops} == {InterpolationMode.BICUBIC} and all(crop["antialias"] for crop in crops)


def test_rotation_leaves_black_corners():
    white = Image.new("RGB", (64, 64), "white")
    darkest = {}
    for aug in RECIPES:
        augment = MultiCropAugmentation(aug, local_crops_number=20, global_crops_size=32, local_crops_size=32)
        torch.manual_seed(0)
        views = [to_pixels(view) for view in augment(white)[2:]]  # local views are not solarised
        darkest[aug] = min(view.min() for view in views)
        centre = min(view[16, 16].min() for view in views)
        assert centre > 100
    assert darkest["aug1"] > 100 and darkest["aug1_2"] == darkest["aug1_4_2"] == 0


def test_view_without_colour_changes_is_the_bicubic_crop(monkeypatch):
    """Without any random operation but the crop, a view is Pillow's bicubic resize of the box, normalised."""
    draws = {}
    make_params = v2.RandomResizedCrop.make_params

    def keep(self, inputs):
        draws.update(make_params(self, inputs))
        return draws

    monkeypatch.setattr(v2.RandomResizedCrop, "make_params", keep)
    monkeypatch.setattr(v2.RandomApply, "forward", lambda self, image: image)
    monkeypatch.setattr(v2.RandomHorizontalFlip, "forward", lambda self, image: image)
    monkeypatch.setattr(v2.RandomGrayscale, "forward", lambda self, image: image)
    augment = MultiCropAugmentation("aug1", local_crops_number=0, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    image = photo(300, 200)
    torch.manual_seed(1)
    view = augment.views[0](F.pil_to_tensor(image))
    left, top = draws["left"], draws["top"]
    box = (left, top, left + draws["width"], top + draws["height"])
    expected = np.asarray(image.resize((224, 224), Image.BICUBIC, box=box)).astype(int)
    assert np.abs(to_pixels(view, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)) - expected)[2:-2, 2:-2].max() <= 2


def test_number_sizes_and_types_of_views():
    augment = MultiCropAugmentation("aug1_4_2", (0.5, 1), (0.1, 0.5), 3, 48, 20)
    views = augment(photo())
    assert [tuple(view.shape) for view in views] == [(3, 48, 48)] * 2 + [(3, 20, 20)] * 3
    assert all(type(view) is torch.Tensor and view.dtype == torch.float32 for view in views)
    shapes = [tuple(view.shape[1:]) for view in MultiCropAugmentation("aug1_2")(photo())]
    assert shapes == [(224, 224)] * 2 + [(96, 96)] * 8
    assert len(MultiCropAugmentation("aug1", local_crops_number=0)(photo())) == 2


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (8, 8)])
def test_images_smaller_than_the_crop(size):
    augment = MultiCropAugmentation("aug1_4_2", local_crops_number=2, global_crops_size=32, local_crops_size=16)
    assert all(view.isfinite().all() for view in augment(photo(*size)))
    assert eval_transform("aug1_4_3", 32)(photo(*size)).shape == (3, 32, 32)


@pytest.mark.parametrize("aug", RECIPES)
def test_torch_seed_alone_fixes_the_views(aug):
    augment = MultiCropAugmentation(aug, local_crops_number=4, global_crops_size=32, local_crops_size=16)
    image, runs = photo(), []
    for seed, other in ((0, 1), (0, 2), (3, 1)):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(seed)
        runs.append(augment(image))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


# --- elastic distortion ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 96), (60, 110)])
def test_elastic_field_and_image_equal_torchvisions(height, width):
    ours, image = ElasticTransform(alpha=100.0), F.pil_to_tensor(photo(width, height))
    torch.manual_seed(0)
    field = ours.displacement(height, width)
    torch.manual_seed(0)
    noise = [torch.rand(1, 1, height, width) * 2 - 1 for _ in range(2)]
    dx, dy = (F.gaussian_blur(n, [41, 41], [5.0, 5.0])[0, 0] for n in noise)
    assert (field[0, :, :, 0] - dx * 100 / width).abs().max() < 1e-5
    assert (field[0, :, :, 1] - dy * 100 / height).abs().max() < 1e-5
    assert field.abs().max() > 0.01

    torch.manual_seed(0)
    distorted = ours(image)
    torch.manual_seed(0)
    if height == width:
        reference = v2.ElasticTransform(alpha=100.0)(image)
    else:  # torchvision 0.21 divides each direction by the other one's side
        reference = F.elastic(image, torch.stack([dx * 100 / width, dy * 100 / height], dim=-1)[None], fill=0)
    assert distorted.dtype == torch.uint8 and not torch.equal(distorted, image)
    assert (distorted.int() - reference.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [1, 2, 16, 20, 21, 64])
def test_smoothing_reflects_as_often_as_needed(size):
    """Padding longer than the side (20 for sigma 5) is reflected repeatedly, as in numpy.pad."""
    noise = np.random.default_rng(0).standard_normal(size)
    taps = np.exp(-0.5 * (np.arange(-20, 21) / 5.0) ** 2)
    expected = np.convolve(np.pad(noise, 20, mode="reflect"), taps / taps.sum(), mode="valid")
    smoothed = smoothing_matrix(size, 5.0).double().numpy() @ noise
    np.testing.assert_allclose(smoothed, expected, atol=1e-6)


def test_elastic_accepts_pil_and_tiny_images():
    image = photo(16, 16)
    torch.manual_seed(0)
    distorted = ElasticTransform(alpha=100.0)(image)
    torch.manual_seed(0)
    as_tensor = ElasticTransform(alpha=100.0)(F.pil_to_tensor(image))
    assert distorted.size == (16, 16) and torch.equal(F.pil_to_tensor(distorted), as_tensor)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbations_repeat_with_the_seed_only(name):
    transform, image = eval_transform(name, size=64), photo(120, 90)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(transform(image))
    assert outputs[0].shape == (3, 64, 64) and outputs[0].dtype == torch.float32
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2]) == (name == "ori")


@pytest.mark.parametrize(
    ("name", "operations", "alpha"),
    [
        ("ori", [], None),
        ("basic", ["jitter"], None),
        ("aug1", ["horizontal_flip", "jitter"], None),
        ("aug1_2", ["rotate", "jitter"], None),
        ("aug1_3", ["rotate", "jitter"], None),
        ("aug1_4_1", ["rotate", "jitter", "elastic"], 50.0),
        ("aug1_4_2", ["rotate", "jitter", "elastic"], 100.0),
        ("aug1_4_3", ["rotate", "jitter", "elastic"], 150.0),
    ],
)
def test_perturbation_operations_order_and_ranges(events, name, operations, alpha):
    transform, image = eval_transform(name, size=16), photo(40, 30)
    draws = 100
    for seed in range(draws):
        seed_draw(seed)
        transform(image)
    expected = ["resize", "center_crop"]
    for operation in operations:
        expected += ["jitter"] * 4 if operation == "jitter" else [operation]
    names = ["jitter" if event in JITTER else event for event, _ in events]
    assert names == expected * draws
    mode = InterpolationMode.BICUBIC if name == "ori" else InterpolationMode.BILINEAR
    assert {(tuple(chosen["size"]), chosen["interpolation"]) for chosen in parameters(events, "resize")} == {((18,), mode)}
    if "jitter" in operations:
        assert_jitter(events, saturation=0.4)
    if "rotate" in operations:
        limit = 180 if name == "aug1_3" else 90
        assert_rotations(events, limit)
        assert max(abs(chosen["angle"]) for chosen in parameters(events, "rotate")) > 0.95 * limit
    elastic = {(chosen["alpha"], chosen["sigma"]) for chosen in parameters(events, "elastic")}
    assert elastic == ({(alpha, 5.0)} if alpha else set())


def centre_crop_by_hand(image, side, size, mode):
    width, height = image.size
    if width >= height:
        resized = image.resize((int(side * width / height), side), mode)
    else:
        resized = image.resize((side, int(side * height / width)), mode)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


@pytest.mark.parametrize(("size", "side"), [(224, 256), (96, 110), (32, 37)])
@pytest.mark.parametrize("shape", [(500, 375), (75, 90)])
def test_ori_is_resize_crop_and_normalise(size, side, shape):
    image, mean, std = photo(*shape), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    crop = np.asarray(centre_crop_by_hand(image, side, size, Image.BICUBIC))
    expected = (crop / 255 - mean) / std  # [S, S, 3]
    actual = eval_transform("ori", size, mean, std)(image)
    np.testing.assert_allclose(actual.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_aug1_is_flip_then_jitter_by_hand(events):
    image = photo(200, 150)
    torch.manual_seed(5)
    actual = to_pixels(eval_transform("aug1")(image))
    expected = ImageOps.mirror(centre_crop_by_hand(image, 256, 224, Image.BILINEAR))
    enhancers = {
        "adjust_brightness": ImageEnhance.Brightness,
        "adjust_contrast": ImageEnhance.Contrast,
        "adjust_saturation": ImageEnhance.Color,
    }
    for name, parameters in events[-4:]:
        (factor,) = parameters.values()
        expected = enhancers[name](expected).enhance(factor) if name in enhancers else F.adjust_hue(expected, factor)
    np.testing.assert_array_equal(actual, np.asarray(expected))


def test_probe_training_images(events):
    transform, image = probe_train_transform(32), Image.new("RGB", (400, 400))
    for seed in range(DRAWS):
        seed_draw(seed)
        assert transform(image).shape == (3, 32, 32)
    crops = parameters(events, "resized_crop")
    area = [crop["height"] * crop["width"] / 400**2 for crop in crops]
    assert 0.079 < min(area) < 0.1 and 0.9 < max(area) <= 1
    assert {crop["interpolation"] for crop in crops} == {InterpolationMode.BILINEAR}
    assert_share(len(parameters(events, "horizontal_flip")), DRAWS, 0.5)
    assert {name for name, _ in events} == {"resized_crop", "horizontal_flip"}


# --- errors ----------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(InputError, match="aug9.*aug1, aug1_2, aug1_4_2"):
        MultiCropAugmentation("aug9")
    with pytest.raises(InputError, match="aug1_9.*ori, basic, aug1, aug1_2, aug1_3, aug1_4_1, aug1_4_2, aug1_4_3"):
        eval_transform("aug1_9")
    with pytest.raises(InputError, match="local_crops_number -1"):
        MultiCropAugmentation("aug1", local_crops_number=-1)


@pytest.mark.parametrize("scale", [(0.4,), (0.4, 0.6, 1), (0, 1), (0.5, 1.1), (0.6, 0.4), (-1, 0.5), (float("nan"), 1)])
def test_bad_crop_scales(scale):
    with pytest.raises(InputError, match="local_crops_scale .*two increasing numbers"):
        check_crop_scale("local_crops_scale", scale)
    with pytest.raises(InputError, match="local_crops_scale"):
        MultiCropAugmentation("aug1", local_crops_scale=scale)
