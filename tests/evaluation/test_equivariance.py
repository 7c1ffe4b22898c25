"""evaluation/equivariance.py: views and their targets, what regressors get, controls, gaps by hand, known answers."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.equivariant_network import STATS, PixelReader, write_ramps

from clever.data.augmentations import DINO_VIEW, VIEW, Views, eval_transform
from clever.data.codes import describe
from clever.data.files import read_pixels
from clever.data.rendering import render_batch
from clever.evaluation.equivariance import (
    GRAM_IMAGES,
    cosine_gap,
    extract_views,
    gram_gap,
    linear_r2,
    measure_gaps,
    regress,
    shuffle_by_image,
    subspaces,
)
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.regression import LinearRegressor
from clever.evaluation.transforms import TRANSFORMS, TransformDataset, inscribed_disc, with_half_angles
from clever.models.heads import Split


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    return write_ramps(tmp_path_factory.mktemp("ramps"), 24, side=32)


@pytest.fixture(scope="module")
def one_photo(tmp_path_factory):
    """A colourful image that is not square."""
    coarse = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "0.png"
    Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC).save(path)
    return [str(path)]


def views_of(paths, name, **options):
    """Pixels [M, 1+V, 3, S, S] and targets [M, V, T]."""
    dataset = TransformDataset(paths, TRANSFORMS[name], size=32, **options)
    return dataset.__getitems__(list(range(len(paths))))


# --- transformations ---------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """Of one view in a crop of 20 x 60 pixels at (10, 30) of an image of 100 x 120 pixels."""
    view = np.zeros((1, 1), VIEW)
    values = {"top": 10, "left": 30, "height": 20, "width": 60, "resized_height": 32, "resized_width": 32, "size": 32,
              "angle": 30, "blur": 1.5, "jitter": 1, "brightness": 1.2, "contrast": 0.8, "saturation": 1.1, "hue": -0.1,
              "flip": 1, "solarize": 0, "grey": 1, "elastic_alpha": 30}  # fmt: skip
    for field, value in values.items():
        view[field] = value
    expected = {
        "rotation": {"sin": 0.5, "cos": np.sqrt(0.75)},
        "rotation_corners": {"sin": 0.5, "cos": np.sqrt(0.75)},
        "crop": {"centre x": 60 / 120, "centre y": 20 / 100, "log width": np.log(0.5), "log height": np.log(0.2)},
        "jitter": {"brightness": 0.5, "contrast": -0.5, "saturation": 0.5, "hue": -1},
        "blur": {"radius": 1.5},
        "elastic": {"elastic": 0.3},
        "flip": {"flip": 1},
        "solarize": {"solarize": -1},
        "grey": {"grey": 1},
    }
    drawn = describe(view, [100], [120], Views([DINO_VIEW]))
    for name, transform in TRANSFORMS.items():
        found = {target: float(function(drawn)[0, 0]) for target, function in transform.targets.items()}
        assert found == pytest.approx(expected[name], abs=1e-6), name
    half = with_half_angles(TRANSFORMS["rotation"])
    assert float(half.targets["sin"](drawn)[0, 0]) == pytest.approx(np.sin(np.pi / 12))
    assert with_half_angles(TRANSFORMS["crop"]) is TRANSFORMS["crop"]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_differ_only_by_the_transformation(one_photo, name):
    """The clean view is that of all evaluations, other operations are off."""
    transform = TRANSFORMS[name]
    dataset = TransformDataset(one_photo, transform, size=32, views=50)
    image = read_pixels(one_photo[0])
    parameters = dataset.views.draw_seeded([0], [48], [60])[0]
    clean, views = parameters[0], parameters[1:]
    (expected,) = render_batch([image], eval_transform("ori", 32).draw_seeded([0], [48], [60]), "torchvision")
    if transform.disc:
        expected = expected * inscribed_disc(32)
    assert torch.equal(dataset.__getitems__([0])[0][0, 0], expected[0, 0])

    fields = {"rotation": ["angle"], "rotation_corners": ["angle"], "jitter": ["jitter"], "elastic": ["elastic_alpha"],
              "crop": ["top", "left", "height", "width", "resized_height", "resized_width", "y", "x"]}  # fmt: skip
    unused = ["brightness", "contrast", "saturation", "hue", "order", "elastic_seed"]  # without jitter and elastic distortion
    for field in set(VIEW.names) - set(fields.get(name, [name])) - set(unused):
        assert (views[field] == clean[field]).all(), field
    assert np.ptp(dataset.__getitems__([0])[1].numpy(), axis=(0, 1)).min() > 0


def test_disc_makes_rotations_of_a_white_image_equal(tmp_path):
    """All views, the clean one too; without it the black corners differ."""
    Image.new("RGB", (70, 64), "white").save(tmp_path / "white.png")
    path = [str(tmp_path / "white.png")]
    for size in (31, 32):
        dataset = TransformDataset(path, TRANSFORMS["rotation"], size, views=40)
        pixels, _ = dataset.__getitems__([0])
        assert (pixels == 255 * inscribed_disc(size)).all()
    corners, _ = views_of(path, "rotation_corners", views=2)
    assert (corners[0, 0] == 255).all() and not torch.equal(corners[0, 1], corners[0, 2])
    assert inscribed_disc(3).tolist() == [[1, 1, 1]] * 3 and inscribed_disc(4).tolist()[0] == [0, 1, 1, 0]


def test_views_are_a_function_of_seed_stream_and_image(ramps):
    _, first = views_of(ramps[:6], "crop", views=3)
    assert torch.equal(views_of(ramps[:6], "crop", views=3)[1], first)
    dataset = TransformDataset(ramps[:6], TRANSFORMS["crop"], 32, views=3)
    assert torch.equal(dataset.__getitems__([4, 1])[1], first[[4, 1]])
    for options in ({"seed": 1}, {"stream": 1}):
        assert not (views_of(ramps[:6], "crop", views=3, **options)[1] == first).all(-1).any()
    assert len(first.flatten(0, 1).unique(dim=0)) == 18
    _, alike = views_of(ramps[:6], "crop", views=3, images_per_draw=4)
    assert (alike[:4] == alike[0]).all() and torch.equal(alike[4], alike[5]) and not (alike[0] == alike[4]).all(-1).any()


# --- what is regressed -------------------------------------------------------------------------------------------------


def test_shuffling_gives_every_image_the_targets_of_another():
    targets = torch.arange(30.0).view(10, 3, 1)
    shuffled = shuffle_by_image(targets, seed=0)
    assert sorted(shuffled[:, 0, 0].tolist()) == targets[:, 0, 0].tolist()
    assert torch.equal(shuffled - shuffled[:, :1], targets - targets[:, :1])  # the views of an image stay together
    assert not (shuffled == targets).any()
    assert not torch.equal(shuffle_by_image(targets, seed=1), shuffled)


def test_subspaces():
    spaces = subspaces(20, ["ALL", "IR", "EF"], Split(20, 0.8), draws=3, seed=0, untrained=True)
    kinds = [(space.part, space.control, space.network, len(space.columns)) for space in spaces]
    assert kinds == [
        ("ALL", None, 0, 20), ("IR", None, 0, 16), ("EF", None, 0, 4), *[("EF", "random_subspace", 0, 4)] * 3,
        ("ALL", "untrained", 1, 20), ("IR", "untrained", 1, 16), ("EF", "untrained", 1, 4),
    ]  # fmt: skip
    assert spaces[1].columns.tolist() == list(range(16)) and spaces[2].columns.tolist() == [16, 17, 18, 19]
    drawn = [tuple(space.columns.tolist()) for space in spaces[3:6]]
    assert len(set(drawn)) == 3 and all(len(set(columns)) == 4 for columns in drawn)
    assert [space.part for space in subspaces(20, ["ALL"], None)] == ["ALL"]


# --- gaps --------------------------------------------------------------------------------------------------------------


def directions(*degrees):
    """Vectors [..., 2] of different lengths."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.linspace(0.5, 3, angles.numel()).view(*angles.shape, 1)


def test_cosine_gap_by_hand():
    """Three images, clean at 0, 90 and 180 degrees; views at distances of 60 and 0, of 90 and 0, of 180 and 60 degrees."""
    features = directions([0.0, 60, 0], [90, 0, 90], [180, 0, 120])
    to_views, to_others = cosine_gap(features)
    assert to_views == pytest.approx((0.5 + 1 + 0 + 1 - 1 + 0.5) / 6, abs=1e-6)
    assert to_others == pytest.approx((0 - 1 + 0) / 3, abs=1e-6)


def test_gram_gap_by_hand():
    """Two images at a distance of 90 degrees; in the views at 60 and 90, their cosines change by .5 and 0."""
    features = directions([0.0, 10, 50], [90, 70, 140])
    assert gram_gap(features) == pytest.approx((0.25 + 0) / 2, abs=1e-6)


# --- known answers -----------------------------------------------------------------------------------------------------


def measure(paths, name, network, spaces, kind="pair"):
    """Records of the linear regressor {(part, control): r2} and gaps {(part, control): record}; a third of the images test."""
    transform = TRANSFORMS[name]
    device, cut = torch.device("cpu"), 2 * len(paths) // 3
    sets = [TransformDataset(part, transform, 32, 4, stream=i) for i, part in enumerate((paths[:cut], paths[cut:]))]
    alike = TransformDataset(paths[cut:], transform, 32, 2, images_per_draw=GRAM_IMAGES, stream=2)
    train, test, gram = (extract_views([network], dataset, device, 64, 0) for dataset in (*sets, alike))
    records = regress(transform, LinearRegressor, kind, spaces, train, test, seed=0)
    gaps = measure_gaps(spaces, test[0], gram[0])
    by_space = [{(record["part"], record["control"]): record for record in group} for group in (records, gaps)]
    return {key: record["r2"] for key, record in by_space[0].items()}, by_space[1]


@pytest.mark.parametrize("name, kind", [("rotation", "single"), ("crop", "pair")])
def test_ef_that_is_the_transformation_and_ir_that_is_the_class(tmp_path, name, kind):
    """The regressors find all of it in EF and nothing in IR; the views of an image have the same IR."""
    network = FeatureExtractor(PixelReader(), stats=STATS)
    paths = write_ramps(tmp_path, 180, side=32)
    r2, gaps = measure(paths, name, network, subspaces(network.dim, ["ALL", "IR", "EF"], PixelReader.split), kind)
    assert r2["EF", None] > 0.99 and r2["ALL", None] > 0.99, r2
    for key in (("IR", None), ("ALL", "shuffled"), ("IR", "shuffled"), ("EF", "shuffled")):
        assert abs(r2[key]) < 0.05, (key, r2)
    ir, ef = gaps["IR", None], gaps["EF", None]
    assert ir["cosine_view"] == pytest.approx(1, abs=1e-6) and ir["gram_gap"] == pytest.approx(0, abs=1e-6)
    assert ir["cosine_gap"] > 0.3
    assert ef["cosine_other"] == pytest.approx(1, abs=1e-6) and ef["cosine_gap"] < -1e-4  # clean images have the same EF


def test_linear_r2_leaves_the_backbone_as_it_was(ramps):
    backbone = torch.nn.Sequential(PixelReader(), torch.nn.Dropout(0.9))
    backbone.embed_dim = PixelReader.embed_dim
    sets = [TransformDataset(ramps[i::2], TRANSFORMS["rotation"], 32, 4, stream=i) for i in range(2)]
    scores = linear_r2(backbone.train(), *sets, torch.device("cpu"), 64, 0, STATS, ["IR", "EF"], PixelReader.split)
    assert scores["EF"] > 0.99 and scores.keys() == {"IR", "EF"} and backbone[1].training
