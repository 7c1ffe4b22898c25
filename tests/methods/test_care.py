"""CARE: the loss of inner products, the embeddings, and the views."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from support.gathering import assert_two_processes_are_one
from support.golden_methods import METHODS, check, fill_as, inputs, settings
from torch import nn

from clever.data.augmentations import MultiCropAugmentation
from clever.methods.care import CARE, compare
from clever.methods.term import WithTerm, mlp
from clever.models.heads import DINOHead, MultiCropWrapper
from clever.utils import InputError


def care(chunk):
    return CARE(0, argparse.Namespace(care_chunk=chunk))


def inner_product_loss(rows1, rows2, chunks):
    return compare(rows1, rows2, chunks)["term"]


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("case", [f"care.rows{i}" for i in range(5)])
def test_loss_and_gradients_are_the_official_ones(case):
    raws = inputs(case)
    rows = [raw / raw.norm(dim=1, keepdim=True) for raw in raws]
    loss = inner_product_loss(*rows, settings(case)["chunks"])
    check(f"{case}.loss", loss)
    gradients = torch.autograd.grad(loss, [*rows, *raws])
    for name, gradient in zip(("rows1", "rows2", "raw1", "raw2"), gradients, strict=True):
        if f"{case}.grad_{name}" in METHODS["numbers"]:
            check(f"{case}.grad_{name}", gradient)


@pytest.mark.parametrize("case", ["hand3", "hand4"])
def test_loss_by_hand(case):
    rows1, rows2 = (torch.tensor(rows, dtype=torch.float64) for rows in inputs(case))
    check(f"{case}.value", inner_product_loss(rows1, rows2, settings(case)["chunks"]))


def test_term_is_the_official_one():
    """With the official projector in the place of DINO's head."""
    case = "care.path0"
    features, projector = inputs(case), mlp(512, 512, 128)
    fill_as(projector, case, "g")
    embeddings = [projector(view) for view in features]
    for i in range(2):
        check(f"{case}.rows{i + 1}", F.normalize(embeddings[i], dim=1))
    value = care(chunk=4)(None, None, torch.cat(embeddings))["term"]
    check(f"{case}.loss", value)
    for i, gradient in enumerate(torch.autograd.grad(value, features), 1):
        check(f"{case}.grad_features{i}", gradient)


def test_an_orthogonal_map_of_all_images_costs_nothing():
    rows, (q, _) = unit_rows(12, 6), torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert inner_product_loss(rows, rows @ q, 3) < 1e-28
    assert inner_product_loss(rows, unit_rows(12, 6), 3) > 0.1


def test_order_within_a_chunk_does_not_matter():
    rows1, rows2 = unit_rows(12, 6), unit_rows(12, 6)
    loss = inner_product_loss(rows1, rows2, 3)
    within = torch.tensor([3, 1, 0, 2, 4, 5, 7, 6, 8, 11, 9, 10])
    across = torch.arange(12).view(3, 4).T.flatten()
    torch.testing.assert_close(inner_product_loss(rows1[within], rows2[within], 3), loss)
    assert (inner_product_loss(rows1[across], rows2[across], 3) - loss).abs() > 1e-3


class Student(WithTerm):
    """A small student with the term, and base views [2, B, ...], codes and extra views [B, 2, ...] as arguments."""

    def __init__(self):
        torch.manual_seed(0)
        head = DINOHead(6, 9, norm_last_layer=False, hidden_dim=8, bottleneck_dim=5)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
        super().__init__(MultiCropWrapper(backbone, head).double(), care(chunk=4))

    def forward(self, views, codes, extra):
        output, values = super().forward([views.flatten(0, 1)], codes, extra.transpose(0, 1))
        return {"term": values["term"] + output.square().mean()}  # a base loss, which all parameters take part in


def student_and_batch():
    views = torch.randn(8, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Student(), views[:, :2].transpose(0, 1), torch.zeros(8, 4, 1), views[:, 2:]


def test_embeddings_are_what_the_last_layer_of_the_head_gets():
    model, views, codes, extra = student_and_batch()
    last, seen = model.student.head.last_layer, []
    last.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    model.student(extra.transpose(0, 1).flatten(0, 1))
    _, values = WithTerm.forward(model, [views.flatten(0, 1)], codes, extra.transpose(0, 1))
    torch.testing.assert_close(values["term"], inner_product_loss(*seen[0].chunk(2), chunks=2))
    values["term"].backward()
    trained = {name for name, p in model.student.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert {"backbone.1.weight", "head.mlp.0.weight", "head.mlp.4.weight"} <= trained and last.weight_v.grad is None


def test_two_processes_are_one(tmp_path):
    assert_two_processes_are_one(student_and_batch, tmp_path, gathers=False)


def test_telemetry_shows_error_and_collapse():
    term = care(chunk=4)
    rows = unit_rows(8, 6)
    equal = term(None, None, torch.cat([rows, rows]))
    assert equal["inner_product_error"] == 0 and equal["inner_product_spread"] > 0.1
    assert term(None, None, torch.ones(16, 6))["inner_product_spread"] < 1e-6
    term.chunk = 2
    pair = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [1, 0]])  # inner products 0 and 0.6
    assert term(None, None, pair)["inner_product_error"].item() == pytest.approx(0.6)


def test_inner_products_are_in_full_precision_within_autocast():
    term = care(chunk=8)
    features = torch.cat([torch.randn(8, 64)] * 2) + 1e-3 * torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(None, None, features)["term"]
    torch.testing.assert_close(value, term(None, None, features)["term"])


def test_views_are_the_two_global_ones_of_the_recipe():
    args = argparse.Namespace(aug="aug1_2", global_crops_scale=[0.3, 1.0], global_crops_size=32, care_chunk=8)
    assert CARE.extra_views(args) == MultiCropAugmentation("aug1_2", (0.3, 1.0), global_crops_size=32).distributions[:2]
    assert CARE.images_per_draw(args) == 8


def test_bad_flags():
    for chunk in (1, 3):
        with pytest.raises(InputError, match=f"care_chunk {chunk}: .* divide --batch_size_per_gpu 8"):
            CARE.check_args(argparse.Namespace(care_chunk=chunk, batch_size_per_gpu=8))
