"""Numbers of the official equivariant methods (tests/golden/methods.json), in double precision.

A case has inputs and weights, drawn by name; its numbers have names that start with the case's.
"""

import json
from typing import Any

import torch
from safetensors.torch import load_file
from support.golden import DATA, tensor

METHODS = json.loads((DATA / "methods.json").read_text())
TENSORS = load_file(DATA / "methods.safetensors")
TOLERANCE = 1e-6  # the tensors are stored as float32


def settings(case: str) -> dict[str, Any]:
    return METHODS["cases"][case]["settings"]


def inputs(case: str) -> list[Any]:
    """The inputs in the file's order: what is drawn, as leaves that take a gradient, and explicit values as they are."""
    values = METHODS["cases"][case]["inputs"].values()
    return [_drawn(**value).requires_grad_() if isinstance(value, dict) else value for value in values]


def _drawn(tensor: str, **options: Any) -> torch.Tensor:
    return globals()["tensor"](tensor, **options).double()


def fill_as(module: torch.nn.Module, case: str, network: str) -> None:
    """Gives a module in double precision the weights of a network of the case; both have the same places and shapes."""
    weights = {name.removeprefix(f"{case}.{network}."): rest for name, *rest in METHODS["cases"][case]["weights"]}
    for name, parameter in module.double().named_parameters():
        shape, scale, shift = weights[name]
        assert list(parameter.shape) == shape
        parameter.data.copy_(tensor(f"{case}.{network}.{name}", shape, scale, shift))
    assert len(list(module.parameters())) == sum(not name.startswith(case) for name in weights)


def check(name: str, actual: torch.Tensor) -> None:
    """Asserts that a number is the official code's."""
    entry = METHODS["numbers"][name]
    expected = torch.tensor(entry["value"]).double() if "value" in entry else TENSORS[name].double()
    assert list(actual.shape) == entry["shape"]
    error = (actual.detach().double() - expected).norm()
    absolute = entry["kind"] in ("exact", "target", "zero")
    allowed = 0 if entry["kind"] == "exact" else TOLERANCE if absolute else TOLERANCE * expected.norm()
    assert error <= allowed, f"{name}: error {error}, norm {expected.norm()}"
