"""AugSelf: targets, heads, losses."""

import argparse

import pytest
import torch
from support.golden_methods import METHODS, check, fill_as, inputs, settings

from clever.data.codes import COLUMNS, relative
from clever.methods.augself import AugSelf, group_loss, r2

GROUPS = ["crop", "color", "flip"]
ALL = [*GROUPS, "rotation", "blur"]


def codes_of(case):
    """The codes [B, 2, P] of a case's views: rows of image, box, flip and colour operations."""
    columns, *views = inputs(case)
    codes = torch.zeros(len(views[0]), 2, len(COLUMNS), dtype=torch.float64)
    for v, rows in enumerate(views):
        d = dict(zip(columns, torch.tensor(rows, dtype=torch.float64).T, strict=True))
        values = {
            "centre y": (d["top"] + d["height"] / 2) / d["image_height"],
            "centre x": (d["left"] + d["width"] / 2) / d["image_width"],
            "height": d["height"] / d["image_height"],
            "width": d["width"] / d["image_width"],
            "flip": d["flip"],
        }
        for name in ("brightness", "contrast", "saturation"):
            values[name] = d["jitter"] * (d[name] - 1) / 0.8
        values["hue"] = d["jitter"] * d["hue"] / 0.2
        for name, value in values.items():
            codes[:, v, COLUMNS.index(name)] = value
    return codes


@pytest.mark.parametrize("case, groups", [("augself.loss0", GROUPS), ("augself.loss1", GROUPS[:2])])
def test_heads_losses_and_gradients_are_the_official_ones(case, groups):
    features = inputs(case)
    width, hidden, weights = (settings(case)[name] for name in ("feature_width", "hidden", "weights"))
    term = AugSelf(width, argparse.Namespace(), groups, hidden=hidden)
    for group, head in term.heads.items():
        fill_as(head, case, group)
        z1, z2 = features
        check(f"{case}.outputs.{group}", head(torch.cat([torch.cat([z1, z2], 1), torch.cat([z2, z1], 1)])))
    terms = term(torch.stack(features), codes_of("augself.targets0")[: len(features[0])])
    losses = {group: terms[f"loss_{group}"] for group in groups} | {"total": weights["crop"] * terms["term"]}
    for name, loss in losses.items():
        check(f"{case}.{name}", loss)
        for i, gradient in enumerate(torch.autograd.grad(loss, features, retain_graph=True), 1):
            if f"{case}.{name}.grad_features{i}" in METHODS["numbers"]:
                check(f"{case}.{name}.grad_features{i}", gradient)


def test_losses_by_hand():
    outputs = torch.tensor([METHODS["cases"]["hand10"]["inputs"][name] for name in ("outputs12", "outputs21")]).double()
    codes = codes_of("hand9")
    both = torch.cat([codes[:, 0], codes[:, 1]]), torch.cat([codes[:, 1], codes[:, 0]])
    check("hand10.value", group_loss("crop", outputs, relative(*both, ["crop"])["crop"]))
    logits, targets = (torch.tensor(values).double()[:, None] for values in inputs("hand11"))
    check("hand11.value", group_loss("flip", logits, targets))
    rotation = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # no tanh: (4 + 1) / 2
    assert group_loss("rotation", *rotation) == 2.5


def random_codes(images=8):
    codes = torch.rand(images, 2, len(COLUMNS)) - 0.5
    codes[..., COLUMNS.index("flip")] = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).repeat(images // 4, 1)
    return codes


def both_orders(codes, groups):
    code1, code2 = codes.unbind(1)
    return relative(torch.cat([code1, code2]), torch.cat([code2, code1]), groups)


def test_order_of_the_views_does_not_matter():
    term = AugSelf(5, argparse.Namespace(), ALL, hidden=32)
    z, codes = torch.randn(2, 8, 5), random_codes()
    torch.testing.assert_close(term(z.flip(0), codes.flip(1))["term"], term(z, codes)["term"])


def test_equal_flips_reverse_the_sign_and_equal_views_do_not_differ():
    codes = random_codes()[[0, 3, 4, 7]]  # both views flipped, or neither
    there, back = both_orders(codes, ["crop", "color"]), both_orders(codes.flip(1), ["crop", "color"])
    assert all(torch.equal(there[group], -back[group]) for group in there)
    same = both_orders(codes[:, :1].expand(-1, 2, -1), GROUPS)
    assert not same["crop"].any() and not same["color"].any() and same["flip"].eq(1).all()


class Says(torch.nn.Module):
    """A head with a fixed output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, pairs):
        return self.output


def test_heads_that_say_how_the_views_differ():
    term, codes = AugSelf(5, argparse.Namespace(), ALL), random_codes()
    targets = both_orders(codes, ALL)
    outputs = {group: target.atanh() for group, target in targets.items()}
    outputs |= {"flip": 100 * (2 * targets["flip"] - 1), "rotation": targets["rotation"]}
    term.heads = torch.nn.ModuleDict({group: Says(output) for group, output in outputs.items()})
    terms = term(torch.randn(2, 8, 5), codes)
    assert terms["term"] < 1e-6
    assert all(terms[f"r2_{group}"] == pytest.approx(1, abs=1e-5) for group in ALL)


def test_r2():
    target = torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    assert r2(target, target) == 1
    assert r2(target.mean(0).expand(3, 2), target) == 0
    assert r2(target + torch.tensor([1.0, 0.0]), target) == pytest.approx(1 - 3 / 4)
    assert r2(torch.rand(3, 2), torch.ones(3, 2)) == 0
