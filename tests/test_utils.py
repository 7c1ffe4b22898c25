"""Schedules, optimizers, clipping, the teacher's update, seeds, files and flags, each against a few lines of plain code."""

import argparse
import copy
import math
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

import distributed
import optim
import utils
from checkpoint import load_checkpoint, load_moments, load_strictly, save_atomically, strip_prefix
from heads import DINOHead
from utils import InputError, TypedFloat


def small_network() -> nn.Module:
    """With 1-D, 2-D and 4-D parameters, biases and buffers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


def with_gradients(network: nn.Module, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    for p in network.parameters():
        p.grad = scale * torch.randn_like(p)
    return network


# --- schedules ---------------------------------------------------------------------------------------------------------


def test_cosine_schedule_by_hand():
    """Two epochs of two steps of warm-up, ends included; then half a cosine over four steps, without its end."""
    values = optim.cosine_scheduler(1.0, 0.2, epochs=4, niter_per_ep=2, warmup_epochs=2, start_warmup_value=0.1)
    warmup = [0.1, 0.4, 0.7, 1.0]
    cosine = [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]
    assert values.tolist() == pytest.approx(warmup + cosine)


def test_cosine_schedule_at_its_limits():
    assert optim.cosine_scheduler(0.5, 1.0, 3, 4).shape == (12,)
    assert np.all(np.diff(optim.cosine_scheduler(0.996, 1.0, 3, 4)) > 0)  # the teacher's momentum rises
    assert optim.cosine_scheduler(3.0, 3.0, 2, 5).tolist() == [3.0] * 10
    assert optim.cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=2).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert optim.cosine_scheduler(1.0, 0.0, 0, 3).shape == (0,)
    assert optim.cosine_scheduler(2.0, 0.0, 1, 1000)[-1] == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="warm-up of 3 epochs: longer than the run .2 epochs"):
        optim.cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=3)


# --- optimizers --------------------------------------------------------------------------------------------------------


def test_1d_parameters_and_biases_are_not_decayed():
    network = nn.ModuleDict({"net": small_network(), "head": DINOHead(5, 7, hidden_dim=6, bottleneck_dim=3)})
    network.register_parameter("matrix", nn.Parameter(torch.ones(2, 2)))
    network.register_parameter("scale", nn.Parameter(torch.ones(3)))
    odd = nn.Module()
    odd.register_parameter("bias", nn.Parameter(torch.ones(2, 2)))  # not 1-D, but a bias
    odd.register_parameter("projs_bias", nn.Parameter(torch.ones(2, 2)))  # only named a bit like one: decays
    network["odd"] = odd
    decayed, plain = optim.param_groups(network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "matrix", "net.0.weight", "net.3.weight", "head.mlp.0.weight", "head.mlp.2.weight", "head.mlp.4.weight",
        "head.last_layer.weight_v", "odd.projs_bias",
    }  # fmt: skip
    assert {names[id(p)] for p in plain["params"]} == {
        "scale", "net.0.bias", "net.1.weight", "net.1.bias", "net.3.bias", "head.mlp.0.bias", "head.mlp.2.bias",
        "head.mlp.4.bias", "odd.bias",
    }  # fmt: skip
    assert not network["head"].last_layer.weight_g.requires_grad  # frozen: in neither
    assert plain["weight_decay"] == 0


def test_schedules_reach_the_groups_as_plain_numbers():
    optimizer = optim.build_optimizer("adamw", optim.param_groups(small_network()))
    optim.set_schedules(optimizer, np.float64(0.25), np.float64(0.125))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.125), (0.25, 0.0)]
    assert {type(group[name]) for group in optimizer.param_groups for name in ("lr", "weight_decay")} == {float}


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", optim.LARS)])
def test_optimizers_by_name(name, kind):
    optimizer = optim.build_optimizer(name, optim.param_groups(small_network()))
    assert type(optimizer) is kind
    if name != "adamw":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    else:
        assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_unknown_optimizer():
    with pytest.raises(InputError, match="'adam': must be one of adamw, sgd, lars"):
        optim.build_optimizer("adam", [])


def test_lars_by_hand():
    """Two steps with a constant gradient; 1-D: plain momentum. 2-D: (g + wd p) scaled by trust |p| / |g + wd p|, momentum."""
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.LARS([matrix, vector], lr=10.0, weight_decay=0.5, momentum=0.9, trust=0.001)
    expected = matrix.detach().clone()
    buffer = torch.zeros(2, 2)
    for _ in range(2):
        matrix.grad, vector.grad = torch.tensor([[-1.5, 0.0], [0.0, 4.0]]), torch.tensor([0.1, -0.2])
        optimizer.step()
        update = matrix.grad + 0.5 * expected
        buffer = 0.9 * buffer + update * 0.001 * expected.norm() / update.norm()
        expected = expected - 10 * buffer
    assert torch.allclose(matrix, expected)
    assert vector.tolist() == pytest.approx([1 - 10 * (1 + 1.9) * 0.1, 2 + 10 * (1 + 1.9) * 0.2])

    first = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    first.grad = torch.tensor([[-1.5, 0.0], [0.0, 4.0]])
    optim.LARS([first], lr=10.0, weight_decay=0.5).step()
    # g + wd p = diag(0, 6) of norm 6, |p| = 5: the step is 10 * 0.001 * 5 / 6 * 6 = 0.05 in the last entry.
    assert first.flatten().tolist() == pytest.approx([3, 0, 0, 3.95])


def test_lars_without_a_direction_or_a_length():
    zeros, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    unused = nn.Parameter(torch.ones(2, 2))
    zeros.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optim.LARS([zeros, still, unused], lr=0.5).step()
    assert zeros.tolist() == [[-0.5] * 2] * 2 and still.tolist() == unused.tolist() == [[1.0] * 2] * 2


def test_lars_of_the_probe_adapts_1d_too():
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    bias.grad = torch.tensor([0.0, 10.0])
    optim.LARS([bias], lr=10.0, adapt_1d=True).step()
    assert bias.tolist() == pytest.approx([3, 4 - 10 * 0.001 * 5])


@pytest.mark.parametrize("max_norm", [0.3, 3.0])
def test_gradients_are_clipped_one_by_one(max_norm):
    network = with_gradients(small_network())
    network[1].bias.grad *= 1e-4  # below the threshold: stays
    network[3].bias.grad = None
    reference = copy.deepcopy(network)
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
        if q.grad is not None:
            torch.nn.utils.clip_grad_norm_([q], max_norm)
    small = network[1].bias.grad.clone()
    optim.clip_gradients(network.parameters(), max_norm)
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-5) and p.grad.norm() <= max_norm * (1 + 1e-5)
    assert torch.equal(network[1].bias.grad, small)
    assert network[0].weight.grad.norm().item() == pytest.approx(max_norm, rel=1e-4)


def test_no_clipping_at_zero():
    network, reference = with_gradients(small_network(), 100.0), with_gradients(small_network(), 100.0)
    optim.clip_gradients(network.parameters(), 0)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(network.parameters(), reference.parameters(), strict=True))
    optim.clip_gradients([nn.Parameter(torch.ones(2))], 1.0)  # nothing has a gradient: nothing to do


def test_teacher_follows_the_parameters_and_keeps_its_buffers():
    student, teacher = small_network(), small_network()
    with torch.no_grad():
        for p in student.parameters():
            p += torch.randn_like(p)
    student(torch.randn(8, 3, 3, 3))  # moves the student's running statistics
    before, buffers = copy.deepcopy(teacher), copy.deepcopy(dict(teacher.named_buffers()))
    teacher.requires_grad_(False)
    optim.update_teacher(teacher, student, 0.9)
    for old, new, p in zip(before.parameters(), teacher.parameters(), student.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-6) and not torch.equal(new, old)
        assert p.requires_grad and not new.requires_grad
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert not torch.equal(student[1].running_mean, teacher[1].running_mean)
    still = copy.deepcopy(teacher)
    optim.update_teacher(teacher, student, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), still.parameters(), strict=True))
    optim.update_teacher(teacher, student, 0.0)
    assert all(torch.allclose(p, q) for p, q in zip(teacher.parameters(), student.parameters(), strict=True))


# --- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "on", "On", "1"])
def test_true_flags(text):
    assert utils.bool_flag(text) is True


@pytest.mark.parametrize("text", ["false", "False", "off", "OFF", "0"])
def test_false_flags(text):
    assert utils.bool_flag(text) is False


@pytest.mark.parametrize("text", ["yes", "", "2", "tru", " true"])
def test_other_flags_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is not one of true, false, on, off, 1, 0"):
        utils.bool_flag(text)


@pytest.mark.parametrize("text", ["0.80", "1e-3", "1E-03", ".5", "5", "5.", "inf"])
def test_typed_floats_print_as_typed(text):
    number = TypedFloat(text)
    assert number == float(text) and isinstance(number, float)
    assert str(number) == f"{number}" == f"{number!s}" == text
    assert type(number * 2) is float and copy.deepcopy(number) == number and str(copy.deepcopy(number)) == text


def test_typed_float_refuses_words():
    with pytest.raises(argparse.ArgumentTypeError, match="'1/2' is not a number"):
        TypedFloat("1/2")


def test_plain_arguments():
    for args in ({"lr": TypedFloat("1e-3"), "n": 3}, argparse.Namespace(lr=TypedFloat("1e-3"), n=3)):
        values = utils.plain_args(args)
        assert values == {"lr": 0.001, "n": 3} and type(values["lr"]) is float


def test_parser_reports_in_one_line():
    parser = utils.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    with pytest.raises(InputError, match=r"^argument --size: invalid int value: 'x' \(--help lists all arguments\)$"):
        parser.parse_args(["--size", "x"])
    with pytest.raises(InputError, match="required: --size"):
        parser.parse_args([])


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_both_spellings_of_local_rank(flag):
    parser = utils.ArgumentParser()
    distributed.add_distributed_arguments(parser)
    assert parser.parse_args([flag, "3"]).local_rank == parser.parse_args([f"{flag}=3"]).local_rank == 3


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_check_positive(value):
    utils.check_positive(argparse.Namespace(lr=1e-9), "lr")
    with pytest.raises(InputError, match=f"--lr {value}: must be greater than 0"):
        utils.check_positive(argparse.Namespace(lr=value), "lr")


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_check_not_negative(value):
    utils.check_not_negative(argparse.Namespace(lr=0), "lr")
    with pytest.raises(InputError, match=f"--lr {value}: must be 0 or greater"):
        utils.check_not_negative(argparse.Namespace(lr=value), "lr")


@pytest.mark.parametrize("name, expected", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_named_precision(name, expected):
    for device in ("cpu", "cuda"):
        assert distributed.resolve_amp_dtype(name, torch.device(device)) is expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_automatic_precision(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    assert distributed.resolve_amp_dtype("auto", torch.device("cpu")) is (torch.bfloat16 if has_bf16 else torch.float32)
    assert distributed.resolve_amp_dtype("auto", torch.device("cuda")) is (torch.bfloat16 if has_bf16 else torch.float16)


# --- processes ---------------------------------------------------------------------------------------------------------


def draws(*key):
    utils.seed_everything(*key)
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_seeds_are_reproducible_and_different_per_key():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2, 1), (2**40, 0, 1)]
    first = {key: draws(*key) for key in keys}
    assert all(draws(*key) == first[key] for key in keys)
    for generator in range(3):
        assert len({tuple(values[generator]) for values in first.values()}) == len(keys)


def test_one_process_without_a_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.init_distributed(argparse.Namespace(local_rank=0, dist_url="env://")) == torch.device("cpu")
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    tensor = torch.ones(2)
    assert distributed.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1, 1]


@pytest.mark.parametrize("rank", [0, 3])
def test_more_processes_than_gpus_is_an_error_of_all(monkeypatch, rank):
    """The first process has a GPU, but must fail as well: only its message is printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes on this machine: only 2 GPUs"):
        distributed.init_distributed(argparse.Namespace(local_rank=0, dist_url="env://"))


@pytest.mark.parametrize("error, status", [(InputError("wrong"), 2), (FloatingPointError("loss is nan"), 1)])
@pytest.mark.parametrize("rank, waits", [(None, []), ("0", []), ("1", [distributed.GRACE_SECONDS])])
def test_errors_become_one_line(monkeypatch, capsys, error, status, rank, waits):
    """Other processes than the first wait before they speak: the launcher ends them meanwhile if the first has spoken."""

    def fail():
        raise error

    slept = []
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: slept.append((seconds, capsys.readouterr().err)))
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        distributed.run_entry_point(fail)
    assert end.value.code == status and slept == [(seconds, "") for seconds in waits]
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert str(error) in captured.err


def test_an_error_of_a_data_loading_worker_loses_its_traceback(capsys):
    def fail():
        raise InputError("Caught InputError in worker 0.\nTraceback:\n  line\nutils.InputError: image x: cannot be read\n")

    with pytest.raises(SystemExit):
        distributed.run_entry_point(fail)
    assert capsys.readouterr().err == "error: image x: cannot be read\n"


def test_other_errors_keep_their_traceback():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        distributed.run_entry_point(fail)


def test_worker_count_is_bounded_by_the_cores():
    assert distributed.worker_count(0) == 0 and distributed.worker_count(1) == 1
    assert 1 <= distributed.worker_count(10**6) <= os.cpu_count()


# --- files -------------------------------------------------------------------------------------------------------------


def test_atomic_writes_replace_and_leave_nothing_else(tmp_path):
    for value in (1, 2):
        save_atomically({"value": torch.tensor(value)}, tmp_path / "a.pth")
        utils.write_text_atomically(f"{value}\n", tmp_path / "b.json")
    assert load_checkpoint(tmp_path / "a.pth")["value"] == 2 and (tmp_path / "b.json").read_text() == "2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.json"]


def test_the_old_text_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    path.write_text("old")
    seen = []
    real = os.replace
    monkeypatch.setattr(utils.os, "replace", lambda source, target: (seen.append(path.read_text()), real(source, target)))
    utils.write_text_atomically("new", path)
    assert seen == ["old"] and path.read_text() == "new"


def test_check_writable_leaves_nothing(tmp_path):
    utils.check_writable(tmp_path)
    utils.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, not a folder"):
        utils.check_writable(tmp_path / "file")
    with pytest.raises(InputError, match="file cannot be written"):
        utils.check_writable(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="cannot be written"):
        utils.check_writable(tmp_path / ("x" * 300) / "below")


def test_prefixes_go_from_the_front_only():
    state = {"module.a.weight": 1, "a.module.b": 2, "module.module.c": 3}
    assert strip_prefix(state) == {"a.weight": 1, "a.module.b": 2, "module.c": 3}


def test_load_strictly(tmp_path):
    network, other = small_network(), nn.Sequential(nn.Linear(2, 2))
    state = {f"module.{name}": value + 1 for name, value in network.state_dict().items()}
    load_strictly(network, state, "student")
    assert torch.equal(network[3].bias, state["module.3.bias"])
    with pytest.raises(InputError, match="^student: does not fit the arguments: .*0.weight") as error:
        load_strictly(other, state, "student")
    assert "\n" not in str(error.value)


def test_load_moments_keeps_the_groups_options():
    """An original's file: its groups lack our option, hold another rate, and its moments are wanted."""
    networks = small_network(), small_network()
    optimizers = [optim.build_optimizer("adamw", optim.param_groups(network)) for network in networks]
    with_gradients(networks[0])
    optim.set_schedules(optimizers[0], 0.1, 0.2)
    optimizers[0].step()
    state = copy.deepcopy(optimizers[0].state_dict())
    for group in state["param_groups"]:
        group.pop("fixed_weight_decay", None)
        group["lr"] = np.float64(7)
    load_moments(optimizers[1], state)
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"])
    optim.set_schedules(optimizers[1], 0.3, 0.4)
    assert [(group["lr"], group["weight_decay"]) for group in optimizers[1].param_groups] == [(0.3, 0.4), (0.3, 0.0)]
    state["param_groups"][0]["params"].pop()
    with pytest.raises(InputError, match=r"groups of \[1, 4\] parameters, here \[2, 4\]"):
        load_moments(optimizers[1], state)
