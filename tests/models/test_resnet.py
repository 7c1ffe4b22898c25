"""ResNets: torchvision's numbers and names, the forms for small images, recomputation."""

import pytest
import torch
import torchvision
from support.golden import fill_, rel_error, tensor
from torch import nn

from clever.models.resnet import resnet8, resnet18, resnet18_small, resnet50, resnet50_small


@pytest.mark.parametrize("build, original", [(resnet18, "resnet18"), (resnet50, "resnet50")])
@torch.no_grad()
def test_equals_torchvision_without_classifier(build, original):
    reference = fill_(torchvision.models.get_model(original, weights=None)).eval()
    reference.fc = nn.Identity()
    network = build().eval()
    network.load_state_dict(reference.state_dict())
    images = tensor("resnet.images", (2, 3, 64, 96))
    assert torch.equal(network(images), reference(images))


@pytest.mark.parametrize("build, large", [(resnet18_small, resnet18), (resnet50_small, resnet50)])
def test_small_stem_keeps_resolution_and_names(build, large):
    network, large = build(), large()
    assert network.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    sizes = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    network.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == [(1, 64, 32, 32)]
    differing = [k for k, v in network.state_dict().items() if v.shape != large.state_dict()[k].shape]
    assert network.state_dict().keys() == large.state_dict().keys() and differing == ["conv1.weight"]


@pytest.mark.parametrize("build", [resnet8, resnet18])
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
