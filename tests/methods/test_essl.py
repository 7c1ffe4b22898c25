"""E-SSL: rotations, head and view."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from support.golden_methods import check, fill_as, inputs, settings

from clever.data.augmentations import DINO_VIEW
from clever.methods.essl import ESSL, rotate
from clever.utils import InputError


def arguments(**values):
    sizes = {"global_crops_size": 224, "global_crops_scale": [0.4, 1.0], "local_crops_size": 96}
    return argparse.Namespace(**{"essl_size": None, "essl_scale": None, **sizes, **values})


@pytest.mark.parametrize("case", ["essl.rotate0", "essl.rotate1"])
def test_rotations_are_the_official_ones(case):
    (images,) = inputs(case)
    check(f"{case}.images", rotate(images))


def test_rotations_of_a_small_image():
    images = rotate(torch.tensor([[1, 2], [3, 4]]).expand(1, 3, 2, 2))
    check("hand13.value", images[:, 0])


def test_four_quarter_turns_are_the_identity():
    images = start = torch.rand(2, 3, 5, 5)
    for _ in range(4):
        images = rotate(images)[2:4]
    assert torch.equal(images, start)


def test_head_and_loss_are_the_official_ones():
    case = "essl.head2"
    (features,) = inputs(case)
    term = ESSL(settings(case)["feature_width"], arguments())
    fill_as(term.head, case, "rotation_projector")
    check(f"{case}.logits", term.head(features))
    terms = term(None, None, features)
    check(f"{case}.loss", terms["term"])
    (gradient,) = torch.autograd.grad(terms["term"], features)
    check(f"{case}.grad_features", gradient[:, :256])
    assert terms["rotation_accuracy"] == (term.head(features).argmax(1) == torch.arange(4)).double().mean()


def test_labels_stand_in_the_order_of_the_images():
    term = ESSL(4, arguments())
    extra = torch.rand(1, 5, 3, 4, 4)
    assert torch.equal(term.images(extra), rotate(extra[0]))
    term.head = torch.nn.Identity()
    terms = term(None, None, 100 * F.one_hot(torch.arange(4).repeat_interleave(5), 4).float())  # features that say the turn
    assert terms["term"] < 1e-6 and terms["rotation_accuracy"] == 1


def test_view_is_small_and_upright():
    (view,) = ESSL.extra_views(arguments())
    assert (view.size, view.scale, view.rotation, view.elastic_p, view.blur_p) == (96, (0.05, 0.14), 0, 0, 0.1)
    assert (view.flip_p, view.jitter_p, view.grey_p) == (DINO_VIEW.flip_p, DINO_VIEW.jitter_p, DINO_VIEW.grey_p)
    (view,) = ESSL.extra_views(arguments(global_crops_size=32))
    assert (view.size, view.scale) == (32, (0.4, 1))
    (view,) = ESSL.extra_views(arguments(global_crops_size=32, essl_size=16, essl_scale=[0.2, 1]))
    assert (view.size, view.scale) == (16, (0.2, 1))


@pytest.mark.parametrize("bad", [{"essl_size": 0}, {"essl_scale": [0.5]}, {"essl_scale": [0.5, 0.2]}])
def test_bad_flags(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        ESSL.check_args(arguments(**bad))
