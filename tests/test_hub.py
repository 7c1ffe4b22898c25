"""`load_backbone` and hubconf.py: the network, its transform as in the evaluations; from any folder."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.processes import ROOT, write_images

import clever
import hubconf
from clever import load_backbone
from clever.data.augmentations import eval_transform
from clever.data.datasets import ImageDataset
from clever.data.files import list_images
from clever.data.rendering import choose_renderer
from clever.models.backbones import build_backbone
from clever.models.layers import normalize
from clever.utils import InputError

STATS = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint of a network with random weights, and images."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", patch_size=8, img_size=32).eval()
    state = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    arguments = {"arch": "vit_micro", "patch_size": 8, "net": "CLeVER", "hp1": 0.8, "global_crops_size": 32}
    arguments |= {"mean": STATS[0], "std": STATS[1]}
    torch.save({"teacher": state, "args": arguments}, root / "clever.pth")
    torch.save({"teacher": state, "args": arguments | {"net": "dino"}}, root / "dino.pth")
    torch.save(state, root / "bare.pth")
    return SimpleNamespace(root=root, backbone=backbone, images=write_images(root / "images", 2))


def test_the_network_is_frozen_in_eval_mode_with_the_pretrained_weights(world):
    network, _, _ = load_backbone(world.root / "clever.pth")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), world.backbone(images))


def test_images_are_transformed_as_by_the_evaluations(world):
    transform = load_backbone(world.root / "clever.pth").transform
    paths = list_images(world.images)
    dataset = ImageDataset([(path, 0) for path in paths], eval_transform("ori", 32), renderer=choose_renderer("auto"))
    for index, path in enumerate(paths):
        pixels, _ = dataset[index]
        with Image.open(path) as image:
            found = transform(image)
        assert found.shape == (3, 32, 32) and found.dtype == torch.float32
        assert torch.equal(found, normalize(pixels, *STATS))


def test_all_of_it_can_be_sent_to_other_processes(world):
    """As a loader's workers do with a transform, and torch.save with a whole network."""
    loaded = load_backbone(world.root / "clever.pth")
    network, transform, split = pickle.loads(pickle.dumps(tuple(loaded)))
    image = Image.new("L", (40, 30), 99)
    assert torch.equal(transform(image), loaded.transform(image))
    z = loaded.network(transform(image)[None])
    for part, same in zip(loaded.split(z), split(network(transform(image)[None])), strict=True):
        assert torch.equal(part, same)
    torch.save(network, world.root / "whole.pt")
    assert torch.equal(torch.load(world.root / "whole.pt", weights_only=False)(transform(image)[None]), z)


def test_errors_are_input_errors(world):
    with pytest.raises(InputError, match="a dino network .* has no IR and EF"):
        load_backbone(world.root / "dino.pth").split(torch.zeros(1, 128))
    with pytest.raises(InputError, match="no such file"):
        load_backbone(world.root / "absent.pth")
    with pytest.raises(InputError, match="--hp1"):
        load_backbone(world.root / "clever.pth", hp1=0.5)
    with pytest.raises(AttributeError, match="load_backbon"):
        clever.load_backbon  # noqa: B018
    (world.root / "damaged.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="damaged.safetensors: damaged"):
        load_backbone(world.root / "damaged.safetensors")


# A user's process, elsewhere: the network and the transform are used after torch.hub has forgotten the repository.
USER = """
import sys, torch
from PIL import Image
network, transform, split = torch.hub.load(sys.argv[1], "backbone", "clever.pth", source="local")
assert sys.argv[1] not in sys.path
images = torch.stack([transform(Image.open(path)) for path in sys.argv[2:]])
z = network(images)
torch.save([z, *split(z)], "features.pt")
"""


def test_torch_hub_loads_it_in_one_line_from_any_folder(world):
    paths = list_images(world.images)
    command = [sys.executable, "-I", "-c", USER, str(ROOT), *paths]
    process = subprocess.run(command, cwd=world.root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    network, transform, split = hubconf.backbone(world.root / "clever.pth")
    z = network(torch.stack([transform(Image.open(path)) for path in paths]))
    for found, expected in zip(torch.load(world.root / "features.pt"), [z, *split(z)], strict=True):
        torch.testing.assert_close(found, expected)
