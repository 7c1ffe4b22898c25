"""ResNets: torchvision's numbers and names, the forms for small images, recomputation."""

import pytest
import torch
import torchvision
from support.golden import fill_, rel_error, tensor
from torch import nn

from clever.models.resnet import (
    resnet8,
    resnet18,
    resnet18_small,
    resnet50,
    resnet50_small,
)

BUILDERS = [resnet8, resnet18, resnet18_small, resnet50, resnet50_small]


@pytest.mark.parametrize("build", BUILDERS)
def test_features_and_gradients(build):
    torch.manual_seed(0)
    network = build().train()
    features = network(torch.randn(4, 3, 32, 32))
    assert features.shape == (4, network.embed_dim)
    (features * torch.randn_like(features)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "build, dim, params",
    [(resnet8, 128, 0.3), (resnet18, 512, 11.2), (resnet18_small, 512, 11.2), (resnet50, 2048, 23.5)],
)
def test_sizes(build, dim, params):
    with torch.device("meta"):
        network = build()
    assert network.embed_dim == dim
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == params


@pytest.mark.parametrize("build, original", [(resnet18, "resnet18"), (resnet50, "resnet50")])
@torch.no_grad()
def test_equals_torchvision_without_classifier(build, original):
    reference = fill_(torchvision.models.get_model(original, weights=None)).eval()
    reference.fc = nn.Identity()
    network = build().eval()
    network.load_state_dict(reference.state_dict())
    images = tensor("resnet.images", (2, 3, 64, 96))
    assert torch.equal(network(images), reference(images))


@pytest.mark.parametrize("build", [resnet18_small, resnet50_small])
def test_small_stem_keeps_resolution_and_names(build):
    network, large = build(), {resnet18_small: resnet18, resnet50_small: resnet50}[build]()
    assert network.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    sizes = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    network.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == [(1, 64, 32, 32)]
    differing = [k for k, v in network.state_dict().items() if v.shape != large.state_dict()[k].shape]
    assert network.state_dict().keys() == large.state_dict().keys() and differing == ["conv1.weight"]


@torch.no_grad()
def test_resnet8_stages():
    network, shapes = resnet8().eval(), {}
    assert {name.split(".")[0] for name in network.state_dict()} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    for name, module in network.named_children():
        module.register_forward_hook(lambda m, i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    network(torch.zeros(1, 3, 32, 32))
    stages = [shapes[name] for name in ("conv1", "layer1", "layer2", "layer3")]
    assert stages == [(32, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4)]


@pytest.mark.parametrize("build", BUILDERS)
def test_initialisation_is_torchvisions(build):
    torch.manual_seed(0)
    for name, module in build().named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


@pytest.mark.parametrize("build", [resnet8, resnet18, resnet50_small])
def test_checkpointing_changes_neither_gradients_nor_statistics(build):
    plain, recomputing = fill_(build()).train(), fill_(build(checkpointing=True)).train()
    assert plain.state_dict().keys() == recomputing.state_dict().keys()
    for network in (plain, recomputing):
        features = [network(tensor(f"resnet.{size}", (3, 3, size, size))) for size in (32, 48)]
        torch.cat(features).square().sum().backward()
    for (name, value), other in zip(plain.state_dict().items(), recomputing.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for (name, p), q in zip(plain.named_parameters(), recomputing.named_parameters(), strict=True):
        assert rel_error(q[1].grad, p.grad) < 1e-5, name
    assert recomputing.bn1.num_batches_tracked == 2


def test_checkpointing_recomputes_each_stage():
    network, calls = resnet8(checkpointing=True), []
    for name in ("layer1", "layer2", "layer3"):
        network.get_submodule(name)[0].conv1.register_forward_hook(lambda *_, name=name: calls.append(name))
    network.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert calls == ["layer1", "layer2", "layer3", "layer3", "layer2", "layer1"]
