"""The closed forms of the losses against the originals' numbers and against a pair-by-pair reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.golden import GOLDEN, rel_error, tensor

from clever.methods.clever import CLeVERLoss, head_regularizer
from clever.methods.dino import DINOLoss
from clever.models.heads import DINOHead

TEMPERATURES = dict(ncrops=4, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, nepochs=10)


def pairwise_reference(student, teacher, center, teacher_temp, ncrops, pair_loss, student_temp=0.1):
    """The definition: the mean of `pair_loss` over all pairs of different views, each pair on its own."""
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1).chunk(2)
    terms = [
        pair_loss(q, s / student_temp) for iq, q in enumerate(targets) for v, s in enumerate(student.chunk(ncrops)) if v != iq
    ]
    return sum(terms) / len(terms)


def cross_entropy_pair(q, s):
    return torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()


def cosine_pair(q, s):
    return F.cosine_similarity(q, F.softmax(s, dim=-1), dim=-1).mean()


def test_dino_loss_golden():
    criterion = DINOLoss(64, **TEMPERATURES)
    for epoch in (0, 1):
        student = tensor("loss.student1", (12, 64), 1.5).requires_grad_()
        loss = criterion(student, tensor("loss.teacher1", (6, 64)), epoch)["loss"]
        loss.backward()
        name = f"dino_loss.epoch{epoch}"
        assert rel_error(loss, GOLDEN[f"{name}.loss"]) < 1e-5
        assert rel_error(student.grad, GOLDEN[f"{name}.grad"]) < 1e-4
        assert rel_error(criterion.center, GOLDEN[f"{name}.center"]) < 1e-5


def test_clever_loss_golden():
    criterion = CLeVERLoss(64, 64, sep_lambd=0.5, **TEMPERATURES)
    for epoch in (0, 1):
        students = [tensor(f"loss.student{i}", (12, 64), 1.5).requires_grad_() for i in (1, 2)]
        teachers = [tensor(f"loss.teacher{i}", (6, 64)) for i in (1, 2)]
        terms = criterion(students, teachers, epoch)
        terms["loss"].backward()
        name = f"clever_loss.epoch{epoch}"
        assert list(terms) == ["loss", "loss_DIR", "loss_DVR"]
        for term, found in terms.items():
            assert rel_error(found, GOLDEN[f"{name}.{term}"]) < 1e-5
        for i, student in enumerate(students, 1):
            assert rel_error(student.grad, GOLDEN[f"{name}.grad{i}"]) < 1e-4
        assert rel_error(criterion.center, GOLDEN[f"{name}.center"]) < 1e-5
        assert rel_error(criterion.center2, GOLDEN[f"{name}.center2"]) < 1e-5


@pytest.mark.parametrize("ncrops", [2, 3, 10])
@pytest.mark.parametrize("batch", [1, 5])
def test_clever_loss_equals_its_definition_with_unequal_heads(ncrops, batch):
    torch.manual_seed(ncrops * 10 + batch)
    criterion = CLeVERLoss(48, 20, ncrops, 0.05, 0.05, 0, 3, sep_lambd=0.7)
    criterion.center.normal_(std=0.1)
    criterion.center2.normal_(std=0.1)
    students = [(0.3 * torch.randn(ncrops * batch, k)).requires_grad_() for k in (48, 20)]
    teachers = [torch.randn(2 * batch, k) for k in (48, 20)]
    centers = criterion.center.clone(), criterion.center2.clone()
    references = [s.detach().clone().double().requires_grad_() for s in students]
    expected = [
        pairwise_reference(s, t.double(), c.double(), 0.05, ncrops, pair_loss)
        for s, t, c, pair_loss in zip(references, teachers, centers, (cross_entropy_pair, cosine_pair), strict=True)
    ]
    (expected[0] + 0.7 * expected[1]).backward()
    loss, loss_dir, loss_dvr = criterion(students, teachers, 0).values()
    (3 * loss).backward()
    assert rel_error(loss_dir, expected[0]) < 1e-5
    assert loss_dvr.item() == pytest.approx(expected[1].item(), rel=1e-5, abs=1e-7)
    for student, reference in zip(students, references, strict=True):
        assert rel_error(student.grad, 3 * reference.grad) < 1e-4


def test_cosine_of_extreme_logits_stays_finite():
    student = torch.tensor([[400.0, -400.0, 0.0]] * 4).requires_grad_()
    ir = torch.zeros(4, 3, requires_grad=True)
    criterion = CLeVERLoss(3, 3, 2, 0.04, 0.04, 0, 1)
    teacher = torch.tensor([[30.0, 0.0, 0.0]] * 4)
    loss_dvr = criterion((ir, student), (torch.zeros(4, 3), teacher), 0)["loss_DVR"]
    loss_dvr.backward()
    assert loss_dvr.item() == pytest.approx(1.0) and torch.isfinite(student.grad).all()


def test_uniform_outputs_cost_ln_k_and_entropy_is_measured():
    criterion = DINOLoss(100, 3, 0.04, 0.04, 0, 1)
    loss = criterion(torch.zeros(6, 100), torch.zeros(4, 100), 0)["loss"]
    assert loss.item() == pytest.approx(math.log(100))
    assert criterion.teacher_entropy.item() == pytest.approx(math.log(100))
    peaked = torch.eye(100)[:4] * 50
    criterion(torch.zeros(6, 100), peaked, 0)
    assert criterion.teacher_entropy.item() == pytest.approx(0.0, abs=1e-6)


def test_center_is_updated_once_per_step_with_the_mean_of_its_micro_batches():
    whole, parts = (DINOLoss(16, 2, 0.04, 0.04, 0, 1) for _ in range(2))
    teacher = torch.randn(2, 6, 16)  # views, B, K
    student = torch.randn(2, 6, 16)
    whole(student.flatten(0, 1), teacher.flatten(0, 1), 0)
    for i in range(3):
        share = slice(2 * i, 2 * i + 2)
        before = parts.center.clone()
        parts(student[:, share].flatten(0, 1), teacher[:, share].flatten(0, 1), 0, update_center=i == 2)
        assert torch.equal(parts.center, before) == (i < 2)
    torch.testing.assert_close(parts.center, whole.center)
    torch.testing.assert_close(whole.center, 0.1 * teacher.mean((0, 1))[None])


def test_head_regularizer_is_the_difference_of_squared_norms_with_its_gradient():
    torch.manual_seed(0)
    head, head2 = DINOHead(12, 300, hidden_dim=16, bottleneck_dim=8), DINOHead(5, 40, hidden_dim=16, bottleneck_dim=8)
    reg = head_regularizer(head, head2)
    sums = [sum((p.detach().double() ** 2).sum() for p in h.parameters()) for h in (head, head2)]
    assert reg.item() == pytest.approx((sums[0] - sums[1]).abs().item(), rel=1e-6)
    reg.backward()
    for h, sign in ((head, 1), (head2, -1)):
        for name, p in h.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, sign * 2 * p.detach(), msg=name)


def test_head_regularizer_keeps_its_digits():
    """Two sums of 4e6 that differ by 1: in float32 the difference would be 0 or 0.5 or worse."""
    a, b = torch.nn.Linear(2048, 2048, bias=False), torch.nn.Linear(2048, 2048, bias=False)
    torch.nn.init.ones_(a.weight)
    torch.nn.init.ones_(b.weight)
    b.weight.data[0, 0] = 2**0.5
    assert head_regularizer(a, b).item() == pytest.approx(1.0, abs=1e-3)


def test_half_precision_gradients_keep_their_digits_near_the_uniform_output():
    """At 65536 outputs their entries, divided by T, are below fp16's smallest step; loss scaling comes too late for them."""
    torch.manual_seed(0)
    out_dim, batch, scale = 65536, 16, 65536.0
    logits = torch.randn(4 * batch, out_dim).mul_(0.01).half()
    teacher = torch.randn(2 * batch, out_dim).mul_(0.01)
    grads = []
    for student in (logits.clone().requires_grad_(), logits.float().requires_grad_()):
        (DINOLoss(out_dim, 4, 0.04, 0.04, 0, 1)(student, teacher, 0)["loss"] * scale).backward()
        grads.append(student.grad.float())
    assert torch.isfinite(grads[0]).all() and rel_error(*grads) < 2e-3
    assert ((grads[0] == 0) & (grads[1].abs() > 1e-3 * grads[1].abs().mean())).sum() == 0
