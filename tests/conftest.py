"""Settings before any test module is imported, and fixtures of several modules."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when kernels are defined


@pytest.fixture(scope="session")
def world_of_bad_input(tmp_path_factory):
    """What the tests of invalid input start from; they leave it unchanged."""
    from support.bad_world import make_bad_world

    return make_bad_world(tmp_path_factory.mktemp("bad_input"))
