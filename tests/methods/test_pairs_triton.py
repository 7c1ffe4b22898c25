"""The Triton kernels of the losses: interpreted on the CPU, and on a GPU where there is one."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.golden import rel_error

from clever.methods.clever import CLeVERLoss

pytest.importorskip("triton")
from clever.methods.pairs_triton import MeanOverPairs  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
LOSSES = {"cross-entropy": 1, "cosine": 2}  # the power of the kernels
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the gradient, which is rounded to the type


@pytest.fixture
def on_cpu(monkeypatch):
    """Launches go to the interpreter, which needs no device."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())


def definition(student, teacher, center, student_temp, teacher_temp, power):
    """Every pair on its own, in float64."""
    t = F.softmax((teacher.double() - center.double()) / teacher_temp, dim=-1)
    x = student.double() / student_temp
    pairs = [(q, v) for q in range(2) for v in range(len(x)) if v != q]
    if power == 1:
        terms = [-(t[q] * F.log_softmax(x[v], dim=-1)).sum(-1).mean() for q, v in pairs]
    else:
        terms = [F.cosine_similarity(t[q], F.softmax(x[v], dim=-1), dim=-1).mean() for q, v in pairs]
    return sum(terms) / len(terms)


def draw(views, batch, outputs, dtype=torch.float32, device="cpu", spread=0.3):
    torch.manual_seed(views + outputs)
    student = (spread * torch.randn(views, batch, outputs)).to(device, dtype).requires_grad_()
    teacher = (spread * torch.randn(2, batch, outputs)).to(device, dtype)
    return student, teacher, 0.1 * torch.randn(1, outputs, device=device)


def assert_as_defined(tensors, power, tolerance, temperatures=(0.1, 0.05), factor=1.0):
    student, *others = tensors
    exact = student.detach().double().requires_grad_()
    expected = definition(exact, *others, *temperatures, power)
    (factor * expected).backward()
    value, entropy = MeanOverPairs.apply(student, *others, *temperatures, power)
    (factor * value).backward()
    assert value.dtype == torch.float32 and student.grad.dtype == student.dtype
    assert rel_error(value, expected) < 1e-5
    assert rel_error(student.grad, exact.grad) < tolerance
    if power == 1:
        t = F.softmax((others[0].double() - others[1].double()) / temperatures[1], dim=-1)
        assert rel_error(entropy, torch.special.entr(t).sum(-1).mean()) < 1e-4


@interpreted
@pytest.mark.parametrize("power", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("views, batch, outputs", [(2, 2, 3), (10, 2, 4096), (4, 3, 4097)])
def test_losses_equal_their_definition(on_cpu, power, views, batch, outputs):
    assert_as_defined(draw(views, batch, outputs), power, 5e-6)


@interpreted
@pytest.mark.parametrize("power", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(on_cpu, power, dtype):
    """With a gradient scaler's factor, without which the entries would underflow in float16."""
    assert_as_defined(draw(3, 4, 5000, dtype), power, TOLERANCES[dtype], factor=65536.0)


@interpreted
@pytest.mark.parametrize("power", LOSSES.values(), ids=LOSSES)
def test_extreme_logits_stay_finite(on_cpu, power):
    student, *others = draw(3, 2, 5000, spread=1e4)
    value, _ = MeanOverPairs.apply(student, *others, 0.1, 0.04, power)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    assert rel_error(value, definition(student, *others, 0.1, 0.04, power)) < 1e-5 or value.abs() < 1e-6


@interpreted
@pytest.mark.parametrize("power", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_reaches_the_value(on_cpu, power, bad):
    student, teacher, center = draw(3, 2, 5000)
    with torch.no_grad():
        student[2, 1, 4999] = bad
        value, _ = MeanOverPairs.apply(student, teacher, center, 0.1, 0.04, power)
    assert not value.isfinite()


@interpreted
def test_a_second_backward_pass_gives_the_same(on_cpu):
    """After a change of the centre in place, too, as `forward` of the losses makes it."""
    student, teacher, center = draw(3, 2, 100)
    value, _ = MeanOverPairs.apply(student, teacher, center, 0.1, 0.04, 1)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    center.add_(1)
    (second,) = torch.autograd.grad(value, student)
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("power", LOSSES.values(), ids=LOSSES)
def test_full_size_on_a_gpu(power, dtype):
    assert_as_defined(draw(10, 8, 65536, dtype, "cuda", spread=0.2), power, TOLERANCES[dtype], factor=1024.0)


@pytest.mark.gpu
def test_memory_and_bits_on_a_gpu():
    """Beside the logits only their gradients exist, and 20 runs give equal bits."""
    criterion = CLeVERLoss(65536, 16384, 10, 0.04, 0.04, 0, 1).cuda()
    students = [torch.randn(10 * 64, k, device="cuda", dtype=torch.bfloat16).requires_grad_() for k in (65536, 16384)]
    teachers = [torch.randn(2 * 64, k, device="cuda", dtype=torch.bfloat16) for k in (65536, 16384)]
    start = {name: buffer.clone() for name, buffer in criterion.named_buffers()}
    found = []
    for _ in range(20):
        criterion.load_state_dict(start)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = criterion(students, teachers, 0)["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, students)])
        assert torch.cuda.max_memory_allocated() - before < sum(each.nbytes for each in students) + 8 * 2**20
        found = [found[0], found[-1]]
        assert all(map(torch.equal, *found))
