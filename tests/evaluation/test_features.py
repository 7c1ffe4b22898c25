"""Frozen features: widths, order of columns, the split into IR and EF; what a checkpoint says of its network."""

import pytest
import torch
from torch import nn

import eval_linear
from clever.evaluation import knn
from clever.evaluation.features import FeatureExtractor, extract_parts, select_part
from clever.evaluation.pretrained import Pretrained, load_pretrained
from clever.evaluation.probe import LinearClassifier
from clever.models.backbones import build_backbone
from clever.models.heads import Split
from clever.utils import InputError

CPU = torch.device("cpu")


class CountingViT(nn.Module):
    """Stands in for a ViT of width D: token t of block b holds 1000 * b + 100 * t + its column's number."""

    def __init__(self, dim=10, depth=4, tokens=3):
        super().__init__()
        self.embed_dim, self.blocks, self.tokens = dim, nn.ModuleList(nn.Identity() for _ in range(depth)), tokens

    def get_intermediate_layers(self, images, n):
        column, token = torch.arange(self.embed_dim), 100 * torch.arange(self.tokens)[:, None]
        depth = len(self.blocks)
        return [(1000.0 * block + token + column).expand(len(images), -1, -1) for block in range(depth - n, depth)]

    get_last_selfattention = None  # a ViT is known by having it; features never call it


# --- which columns -----------------------------------------------------------------------------------------------------


# CountingViT, D 10, two patches: [CLS] of block 3 holds 3000.., the mean patch token 3150... With hp1 0.8 EF is 8 and 9.
@pytest.mark.parametrize(
    "part, n, expected",
    [
        ("ALL", 1, [value for c in range(10) for value in (3000 + c, 3150 + c)]),
        ("ALL", 2, [*range(2000, 2010), *range(3000, 3010), *range(3150, 3160)]),
        ("IR", 1, [*range(3000, 3008), *range(3150, 3158)]),
        ("IR", 2, [*range(2000, 2010), *range(3000, 3008), *range(3150, 3158)]),
        ("EF", 1, [3008, 3009, 3158, 3159]),
        ("EF", 2, [3008, 3009, 3158, 3159]),
    ],
)
def test_mean_patch_token_is_interleaved_or_behind(part, n, expected):
    extractor = FeatureExtractor(CountingViT(), part, Split(10, 0.8), n_last_blocks=n, avgpool=True)
    features = extractor(torch.empty(3, 3, 8, 8))
    assert extractor.dim == len(expected) and features.tolist() == [expected] * 3


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("part, other", [("IR", "EF"), ("EF", "IR")])
def test_a_parts_logits_do_not_move_with_the_other_part(part, other, n):
    """The probe of one part, trained or not, gives bit-identical logits whatever the other part's columns hold."""
    torch.manual_seed(0)
    dim, split = 192, Split(192, 0.8)
    z = torch.randn(5, n * dim)
    columns = {"IR": slice(0, n * dim - 39), "EF": slice(n * dim - 39, n * dim)}
    classifier = LinearClassifier(select_part(z, part, split).shape[1], 7)
    before = classifier(select_part(z, part, split))
    overwritten, moved = z.clone(), z.clone()
    overwritten[:, columns[other]] = float("nan")
    moved[:, columns[part]] += 1
    assert torch.equal(classifier(select_part(overwritten, part, split)), before)
    assert not torch.allclose(classifier(select_part(moved, part, split)), before)


def test_features_of_a_loader_and_of_an_empty_share():
    torch.manual_seed(0)
    backbone = build_backbone("resnet8").eval()
    extractors = [FeatureExtractor(backbone, part, Split(128, 0.8), n_last_blocks=4) for part in ("ALL", "IR", "EF")]
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([3, 1, 4, 1, 5])
    (z, ir, ef), found = extract_parts(extractors, [(images[:3], labels[:3]), (images[3:], labels[3:])], CPU)
    assert torch.equal(found, labels) and not z.requires_grad and ir.is_contiguous()
    assert torch.allclose(z, backbone(images), atol=1e-6) and torch.equal(torch.cat([ir, ef], dim=1), z)
    assert ef.shape == (5, extractors[2].dim) == (5, 26)
    (features, *_), found = extract_parts(extractors, [], CPU)
    assert features.shape == (0, 128) and found.shape == (0,) and found.dtype == torch.long


@pytest.mark.parametrize("train_images, sizes", [(60, [10, 10, 10, 7]), (1000, 37 * [1]), (5, [37])])
def test_the_memory_of_the_search_for_neighbours_is_bounded(monkeypatch, train_images, sizes):
    """At most 600 similarities at a time, or one query; the neighbours are as if they were searched at once."""
    torch.manual_seed(0)
    arguments = torch.randn(train_images, 8), torch.randint(5, (train_images,)), torch.randn(37, 8)
    ((whole, classes, _),) = knn.search_neighbors(*arguments, k=3)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 600)
    parts = list(knn.search_neighbors(*arguments, k=3))
    assert [len(similarity) for similarity, _, _ in parts] == sizes
    assert torch.allclose(torch.cat([similarity for similarity, _, _ in parts]), whole, atol=1e-5)
    assert torch.equal(torch.cat([found for _, found, _ in parts]), classes)


# --- what a checkpoint says --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file with a ViT's weights and the arguments of its pretraining."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", patch_size=8, img_size=32)
    arguments = {"arch": "vit_micro", "patch_size": 8, "net": "CLeVER", "hp1": 0.8, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    state["module.head.mlp.0.weight"] = torch.ones(2, 2)
    path = tmp_path_factory.mktemp("features") / "checkpoint.pth"
    torch.save({"teacher": state, "args": arguments, "epoch": 12}, path)
    return path


def load(path, *flags) -> Pretrained:
    words = ["--pretrained_weights", str(path), "--data_path", "unused", *map(str, flags)]
    return load_pretrained(eval_linear.get_args_parser().parse_args(words), CPU)


def test_the_network_comes_from_its_checkpoint(checkpoint):
    pretrained = load(checkpoint)
    assert (pretrained.arch, pretrained.net, pretrained.hp1, pretrained.epochs) == ("vit_micro", "CLeVER", 0.8, 12)
    assert pretrained.mean == (0.5,) * 3 and pretrained.std == (0.25,) * 3 and pretrained.img_size == 32
    assert not pretrained.backbone.training and not any(p.requires_grad for p in pretrained.backbone.parameters())
    saved = torch.load(checkpoint, weights_only=True)["teacher"]
    for name, value in pretrained.backbone.state_dict().items():
        assert torch.equal(value, saved[f"module.backbone.{name}"])


def test_a_bare_state_dict_needs_the_flags(checkpoint, tmp_path):
    torch.save(torch.load(checkpoint, weights_only=True)["teacher"], tmp_path / "bare.pth")
    flags = ("--arch", "vit_micro", "--patch_size", 8)
    pretrained = load(tmp_path / "bare.pth", *flags)
    assert pretrained.net == "dino" and pretrained.hp1 == 1.0 and pretrained.epochs is None and pretrained.img_size == 32
    assert pretrained.fingerprint == load(checkpoint).fingerprint
    assert load(tmp_path / "bare.pth", *flags, "--net", "CLeVER", "--hp1", 0.6).hp1 == 0.6
    with pytest.raises(InputError, match="give the pretraining's hp1"):
        load(tmp_path / "bare.pth", *flags, "--net", "CLeVER")
