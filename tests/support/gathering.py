"""Terms on several processes: two processes of half the batch each do what one does with the whole."""

import torch
from support.processes import fork, free_port, wait
from torch import nn


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Its batch norms replaced by nothing: on CPUs they have statistics of their own in every process."""
    for name, child in module.named_children():
        setattr(module, name, nn.Identity() if isinstance(child, nn.BatchNorm1d) else without_batch_norm(child))
    return module


def values_and_gradients(model, z, codes, extra):
    values = model(z, codes, extra)
    values["term"].backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in values.items()} | gradients


def half(build, rank, port, output):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    term, z, codes, extra = build()
    own = slice(rank * len(codes) // 2, (rank + 1) * len(codes) // 2)
    model = nn.parallel.DistributedDataParallel(term)
    torch.save(values_and_gradients(model, z[:, own], codes[own], None if extra is None else extra[own]), output)
    torch.distributed.destroy_process_group()


def assert_two_processes_are_one(build, tmp_path, gathers=True):
    """`build`, a module's function, gives a term and its arguments; batch and weights are the same in every process.

    A term that gathers has the value of the whole batch in every process.
    """
    port, outputs = free_port(), [tmp_path / "0", tmp_path / "1"]
    assert wait([fork(half, build, rank, port, output) for rank, output in enumerate(outputs)]) == [0, 0]
    one, (first, second) = values_and_gradients(*build()), map(torch.load, outputs)
    assert one.keys() == first.keys()
    for name, value in one.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value, msg=name)
    if gathers:
        torch.testing.assert_close(first["term"], one["term"])
