"""The training step: the original's trajectory, and CLeVER's step against a plain reference."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.golden import CORE, GOLDEN, fill_, rel_error, tensor

import main_dino
from clever.methods.clever import parse_reg_lambd
from clever.training import build, optim

CPU = torch.device("cpu")


def parse(*flags):
    return main_dino.get_args_parser().parse_args(["--data_path", "unused", *map(str, flags)])


def build_run(args, steps_per_epoch=1):
    """The run of these arguments, on a CPU."""
    student, teacher = build.build_networks(args, CPU)
    return build.build_pretraining(args, student, teacher, CPU, steps_per_epoch)


class FixedBatches:
    """Stands in for the data loader: a list of batches of views."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter((by_resolution(views), None) for views in self.batches)


def by_resolution(views):
    """Views [B, 3, S, S], those of equal size adjacent -> a tensor [V', B, 3, S, S] per resolution."""
    return [torch.stack(list(group)) for _, group in itertools.groupby(views, key=lambda view: view.shape[-1])]


def test_dino_trajectory_golden():
    args = parse(
        "--net", "dino", "--arch", "vit_tiny", "--drop_path_rate", 0, "--out_dim", 256, "--local_crops_number", 2,
        "--batch_size_per_gpu", 2, "--lr", 0.0005 * 128, "--epochs", 2, "--warmup_epochs", 1, "--use_fp16", "false",
    )  # fmt: skip
    training = build_run(args, steps_per_epoch=5)
    for network in (training.student, training.teacher):
        fill_(network)
    losses = []

    def record(student, teacher, epoch, update_center):
        terms = original(student, teacher, epoch, update_center)
        losses.append(terms["loss"])
        return terms

    original, training.criterion.forward = training.criterion.forward, record
    for epoch in range(2):
        batches = [
            [tensor(f"traj.{5 * epoch + i}.{j}", (2, 3, size, size)) for j, size in enumerate((224, 224, 96, 96))]
            for i in range(5)
        ]
        training.train_one_epoch(FixedBatches(batches), epoch)
    assert rel_error(torch.stack(losses)[:, None], GOLDEN["trajectory.dino.losses"]) < 1e-4
    for name, network in (("student", training.student), ("teacher", training.teacher)):
        state, expected = network.state_dict(), CORE[f"trajectory.dino.{name}"]
        assert set(state) == set(expected)
        for key, (total, norm) in expected.items():
            if key.endswith("qkv.bias"):
                continue  # its key third has a gradient of zero, which Adam turns into noise
            value = state[key].double()
            assert value.norm().item() == pytest.approx(norm, rel=1e-4), key
            assert value.sum().item() == pytest.approx(total, abs=1e-4 * norm * math.sqrt(value.numel())), key


def reference_clever_step(student, teacher, views, args, center, center2):
    """The objective of CLeVER written pair by pair, in plain torch."""
    temp = args.teacher_temp
    s1, s2 = student(views)
    with torch.no_grad():
        t1, t2 = teacher(views[:2])
    q1 = F.softmax((t1 - center) / temp, -1).chunk(2)
    q2 = F.softmax((t2 - center2) / temp, -1).chunk(2)
    s1, s2 = s1.chunk(len(views)), s2.chunk(len(views))
    pairs = [(q, v) for q in range(2) for v in range(len(views)) if q != v]
    loss_dir = sum(-(q1[q] * F.log_softmax(s1[v] / 0.1, -1)).sum(-1).mean() for q, v in pairs) / len(pairs)
    loss_dvr = sum(F.cosine_similarity(q2[q], F.softmax(s2[v] / 0.1, -1), dim=-1).mean() for q, v in pairs) / len(pairs)
    squares = [sum((p.double() ** 2).sum() for p in head.parameters()) for head in (student.head, student.head2)]
    reg = 0.01 * (squares[0] - squares[1]).abs()
    return loss_dir + args.sep_lambd * loss_dvr + reg, (t1.mean(0), t2.mean(0))


def test_clever_steps_equal_a_plain_reference_with_unequal_heads():
    args = parse(
        "--net", "CLeVER", "--arch", "vit_micro", "--patch_size", 8, "--global_crops_size", 32, "--local_crops_size", 16,
        "--drop_path_rate", 0, "--out_dim", 96, "--DVR_out_dim", 40, "--local_crops_number", 2, "--batch_size_per_gpu", 3,
        "--lr", 0.05, "--epochs", 2, "--warmup_epochs", 0, "--freeze_last_layer", 0, "--reg_lambd", "_reg0.01",
        "--sep_lambd", 0.5, "--clip_grad", 0.5, "--amp_dtype", "fp32",
    )  # fmt: skip
    training = build_run(args, steps_per_epoch=3)
    student, teacher = copy.deepcopy(training.student), copy.deepcopy(training.teacher)
    torch.manual_seed(0)
    batches = [[torch.randn(3, 3, s, s) for s in (32, 32, 16, 16)] for _ in range(3)]
    training.train_one_epoch(FixedBatches(batches), 0)

    decayed = [p for n, p in student.named_parameters() if p.requires_grad and p.ndim > 1 and not n.endswith(".bias")]
    others = [p for n, p in student.named_parameters() if p.requires_grad and (p.ndim == 1 or n.endswith(".bias"))]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.0)
    center, center2 = torch.zeros(1, 96), torch.zeros(1, 40)
    for step, views in enumerate(batches):
        loss, means = reference_clever_step(student, teacher, views, args, center, center2)
        optimizer.zero_grad()
        loss.backward()
        for p in student.parameters():
            if p.grad is not None:
                torch.nn.utils.clip_grad_norm_([p], 0.5)
        for group in optimizer.param_groups:
            group["lr"] = training.schedules["lr"][step]
        optimizer.param_groups[0]["weight_decay"] = training.schedules["wd"][step]
        optimizer.step()
        center, center2 = (0.9 * c + 0.1 * m for c, m in zip((center, center2), means, strict=True))
        m = training.schedules["momentum"][step]
        for p_teacher, p_student in zip(teacher.parameters(), student.parameters(), strict=True):
            p_teacher.data = m * p_teacher.data + (1 - m) * p_student.data
    for ours, reference in ((training.student, student), (training.teacher, teacher)):
        for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
            if not name.endswith("qkv.bias"):
                assert rel_error(p, q) < 1e-4, name
    assert rel_error(training.criterion.center, center) < 1e-4
    assert rel_error(training.criterion.center2, center2) < 1e-4


SMALL = (
    "--arch", "resnet8", "--global_crops_size", 32, "--local_crops_size", 16, "--out_dim", 64, "--DVR_out_dim", 32,
    "--local_crops_number", 1, "--epochs", 1, "--warmup_epochs", 0,
)  # fmt: skip


def test_accumulation_moves_everything_once_per_step():
    """Two micro-batches of ViTs (no batch statistics) are one batch of twice the size."""
    flags = (
        "--arch", "vit_micro", "--patch_size", 8, "--global_crops_size", 32, "--local_crops_size", 16, "--out_dim", 64,
        "--DVR_out_dim", 32, "--local_crops_number", 1, "--epochs", 1, "--warmup_epochs", 0, "--drop_path_rate", 0,
        "--amp_dtype", "fp32",
    )  # fmt: skip
    torch.manual_seed(0)
    views = [[torch.randn(4, 3, s, s) for s in (32, 32, 16)] for _ in range(2)]
    halves = [[view[part] for view in batch] for batch in views for part in (slice(0, 2), slice(2, 4))]
    results = []
    for batches, batch_size, accumulation in ((views, 4, 1), (halves, 2, 2)):
        args = parse(*flags, "--batch_size_per_gpu", batch_size, "--accumulation", accumulation)
        training = build_run(args, steps_per_epoch=2)
        training.train_one_epoch(FixedBatches(batches), 0)
        results.append(training)
    for network in ("student", "teacher", "criterion"):
        states = [getattr(training, network).state_dict() for training in results]
        for name in states[0]:
            if not name.endswith("qkv.bias"):
                assert rel_error(states[1][name], states[0][name]) < 1e-4, (network, name)


def test_teacher_keeps_its_own_running_statistics_and_has_no_stochastic_depth():
    args = parse(*SMALL, "--batch_size_per_gpu", 4)
    training = build_run(args)
    before = copy.deepcopy(training.teacher.state_dict())
    batches = [[torch.randn(4, 3, s, s) for s in (32, 32, 16)]]
    training.train_one_epoch(FixedBatches(batches), 0)
    mean = "backbone.bn1.running_mean"
    with torch.no_grad():
        own = training.teacher.backbone.conv1(torch.cat(batches[0][:2]))
    # The convolution has not moved yet when the teacher sees the batch, and by under 0.4 % afterwards.
    assert rel_error(training.teacher.state_dict()[mean], 0.1 * own.mean((0, 2, 3))) < 0.05
    assert not torch.equal(training.student.state_dict()[mean], training.teacher.state_dict()[mean])
    assert not torch.equal(before[mean], training.teacher.state_dict()[mean])

    vit = build_run(parse("--arch", "vit_micro", "--drop_path_rate", 0.5, "--out_dim", 8, "--DVR_out_dim", 8))
    image = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        assert vit.teacher.training and torch.equal(vit.teacher.backbone(image), vit.teacher.backbone(image))
        assert not torch.equal(vit.student.backbone(image), vit.student.backbone(image))


def test_frozen_last_layer_of_both_heads_stands_still():
    args = parse(*SMALL, "--batch_size_per_gpu", 2, "--freeze_last_layer", 1)
    training = build_run(args, steps_per_epoch=2)
    before = copy.deepcopy(training.student.state_dict())
    batches = [[torch.randn(2, 3, s, s) for s in (32, 32, 16)]] * 2
    training.train_one_epoch(FixedBatches(batches), 0)
    after = training.student.state_dict()
    for head in ("head", "head2"):
        assert torch.equal(after[f"{head}.last_layer.weight_v"], before[f"{head}.last_layer.weight_v"])
        assert not torch.equal(after[f"{head}.mlp.0.weight"], before[f"{head}.mlp.0.weight"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_non_finite_loss_names_the_term(accumulation):
    args = parse(*SMALL, "--batch_size_per_gpu", 2, "--accumulation", accumulation)
    training = build_run(args)
    before = copy.deepcopy(training.student.state_dict())
    views = [torch.randn(2, 3, s, s) for s in (32, 32, 16)]
    with torch.no_grad():
        training.student.head2.last_layer.weight_v[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 1 of \d.*loss_DVR is nan"):
        training.train_one_epoch(FixedBatches([views] * accumulation), 0)
    assert torch.equal(training.student.state_dict()["head.mlp.0.weight"], before["head.mlp.0.weight"])


@pytest.mark.parametrize("text, value", [("_reg0.001", 0.001), ("reg0.5", 0.5), ("0.01", 0.01), ("1e-4", 1e-4), ("", 0.0)])
def test_spellings_of_the_regulariser(text, value):
    assert parse_reg_lambd(text) == value


def test_schedules_scale_with_all_images_of_a_step():
    args = parse("--batch_size_per_gpu", 32, "--accumulation", 4, "--lr", 0.001, "--epochs", 20, "--warmup_epochs", 10)
    schedules = build.build_schedules(args, steps_per_epoch=3)
    assert all(len(values) == 60 for values in schedules.values())
    assert schedules["lr"].max() == pytest.approx(0.001 * 128 / 256)
    assert np.all(np.diff(schedules["momentum"]) > 0) and schedules["wd"][0] == pytest.approx(0.04)


def test_schedule_golden():
    values = optim.cosine_scheduler(0.002, 1e-6, 5, 7, warmup_epochs=2)
    assert rel_error(torch.from_numpy(values).float(), GOLDEN["cosine_scheduler.warmup"].float()) < 1e-6


def test_weights_that_are_not_finite_are_named_before_they_are_saved():
    training = build_run(parse(*SMALL))
    optim.check_weights(training.student, "epoch 0")
    with torch.no_grad():
        training.student.head2.mlp[0].bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="epoch 0.*head2.mlp.0.bias"):
        optim.check_weights(training.student, "epoch 0")
