"""Frozen features: widths, order of columns, the split into IR and EF; the k-NN vote; what a checkpoint says of its network."""

import numpy as np
import pytest
import torch
from torch import nn

import eval_linear
from clever.evaluation import knn
from clever.evaluation.features import (
    FeatureExtractor,
    extract_features,
    extract_parts,
    select_part,
)
from clever.evaluation.knn import knn_predict
from clever.evaluation.pretrained import Pretrained, check_part, load_pretrained
from clever.evaluation.probe import LinearClassifier
from clever.models.backbones import build_backbone
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


class Recorded(nn.Module):
    """A pooled backbone whose features are given."""

    def __init__(self, z):
        super().__init__()
        self.z, self.embed_dim = z, z.shape[1]

    def forward(self, images):
        return self.z[: len(images)]


# --- which columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, width", [("ALL", 768), ("IR", 729), ("EF", 39)])
def test_widths_of_vit_tiny(part, width):
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", img_size=32).eval()
    extractor = FeatureExtractor(backbone, part, hp1=0.8, n_last_blocks=4)
    images = torch.randn(2, 3, 32, 32)
    features = extractor(images)
    assert extractor.dim == width and features.shape == (2, width)
    cls = torch.cat([tokens[:, 0] for tokens in backbone.get_intermediate_layers(images, 4)], dim=1)  # B, n*D
    expected = {"ALL": cls, "IR": cls[:, :729], "EF": cls[:, 729:]}[part]
    assert torch.equal(features, expected)
    assert torch.equal(cls[:, -192:], backbone(images))  # the last block stands last


# Per width D and hp1 0.8: the columns of IR and of EF (design, the probe's parts).
@pytest.mark.parametrize("dim, ir, ef", [(192, 153, 39), (384, 307, 77), (512, 409, 103), (768, 614, 154), (2048, 1638, 410)])
def test_cut_of_each_width(dim, ir, ef):
    z = torch.arange(4.0 * dim)[None]
    assert select_part(z, dim, "ALL", 0.8).shape == (1, 4 * dim)
    assert select_part(z, dim, "IR", 0.8)[0].tolist() == list(range(4 * dim - ef))
    assert select_part(z, dim, "EF", 0.8)[0].tolist() == list(range(4 * dim - ef, 4 * dim))
    assert select_part(z[:, :dim], dim, "IR", 0.8).shape == (1, ir)


def test_tokens_stand_oldest_block_first():
    features = FeatureExtractor(CountingViT(dim=3, depth=4), n_last_blocks=2)(torch.empty(2, 3, 8, 8))
    assert features.tolist() == [[2000, 2001, 2002, 3000, 3001, 3002]] * 2


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
    extractor = FeatureExtractor(CountingViT(), part, hp1=0.8, n_last_blocks=n, avgpool=True)
    features = extractor(torch.empty(3, 3, 8, 8))
    assert extractor.dim == len(expected) and features.tolist() == [expected] * 3


@pytest.mark.parametrize("n, avgpool", [(1, True), (2, True), (2, False)])
def test_parts_extracted_together_equal_those_extracted_alone(n, avgpool):
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", patch_size=8, img_size=16).eval()
    extractors = [FeatureExtractor(backbone, part, 0.8, n, avgpool) for part in ("IR", "ALL", "EF")]
    batches = [(torch.randn(3, 3, 16, 16), torch.tensor([2, 0, 1])), (torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))]
    together, labels = extract_parts(extractors, batches, CPU)
    for extractor, features in zip(extractors, together, strict=True):
        alone, expected_labels = extract_features(extractor, batches, CPU)
        assert torch.equal(features, alone) and features.is_contiguous() and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("part, width", [("ALL", 128), ("IR", 102), ("EF", 26)])
def test_pooled_backbones_ignore_the_number_of_blocks(part, width):
    torch.manual_seed(0)
    backbone = build_backbone("resnet8").eval()
    extractor = FeatureExtractor(backbone, part, hp1=0.8, n_last_blocks=4)
    images = torch.randn(2, 3, 16, 16)
    z = backbone(images)
    assert extractor.dim == width
    assert torch.equal(extractor(images), {"ALL": z, "IR": z[:, :102], "EF": z[:, 102:]}[part])


def test_extractor_refuses_what_the_backbone_does_not_have():
    for n in (0, 5):
        with pytest.raises(InputError, match=rf"n_last_blocks {n}: must lie in 1\.\.4"):
            FeatureExtractor(CountingViT(), n_last_blocks=n)
    with pytest.raises(InputError, match="only a ViT has patch tokens"):
        FeatureExtractor(Recorded(torch.empty(1, 8)), avgpool=True)
    with pytest.raises(InputError, match="'DIR': must be one of ALL, IR, EF"):
        FeatureExtractor(CountingViT(), "DIR")
    with pytest.raises(InputError, match="leaves the IR or the EF .* empty"):
        FeatureExtractor(CountingViT(), "EF", hp1=1.0)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("part, other", [("IR", "EF"), ("EF", "IR")])
def test_a_parts_logits_do_not_move_with_the_other_part(part, other, n):
    """The probe of one part, trained or not, gives bit-identical logits whatever the other part's columns hold."""
    torch.manual_seed(0)
    dim, hp1 = 192, 0.8
    z = torch.randn(5, n * dim)
    columns = {"IR": slice(0, n * dim - 39), "EF": slice(n * dim - 39, n * dim)}
    classifier = LinearClassifier(select_part(z, dim, part, hp1).shape[1], 7)
    before = classifier(select_part(z, dim, part, hp1))
    for value in (0.0, 1e6, float("nan")):
        overwritten = z.clone()
        overwritten[:, columns[other]] = value
        assert torch.equal(classifier(select_part(overwritten, dim, part, hp1)), before)
    moved = z.clone()
    moved[:, columns[part]] += 1
    assert not torch.allclose(classifier(select_part(moved, dim, part, hp1)), before)


@pytest.mark.parametrize("part", ["IR", "EF"])
def test_the_whole_path_from_backbone_to_logits_ignores_the_other_part(part):
    torch.manual_seed(0)
    z, images = torch.randn(4, 50), torch.empty(4, 3, 8, 8)
    other = slice(40, 50) if part == "IR" else slice(0, 40)
    overwritten = z.clone()
    overwritten[:, other] = float("nan")
    extractor = FeatureExtractor(Recorded(z), part, hp1=0.8)
    classifier = LinearClassifier(extractor.dim, 3)
    logits = classifier(extractor(images))
    assert torch.equal(classifier(FeatureExtractor(Recorded(overwritten), part, hp1=0.8)(images)), logits)


def test_features_of_a_loader_and_of_an_empty_share():
    torch.manual_seed(0)
    backbone = build_backbone("resnet8").eval()
    extractor = FeatureExtractor(backbone)
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([3, 1, 4, 1, 5])
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    features, found = extract_features(extractor, batches, CPU)
    assert torch.equal(found, labels) and not features.requires_grad
    assert torch.allclose(features, backbone(images), atol=1e-6)
    features, found = extract_features(extractor, [], CPU)
    assert features.shape == (0, 128) and found.shape == (0,) and found.dtype == torch.long


# --- k-NN --------------------------------------------------------------------------------------------------------------


def at_angles(*degrees):
    angle = torch.tensor(degrees, dtype=torch.double).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_vote_of_three_neighbours_by_hand():
    """A query at 0 degrees; neighbours at 10 (class 2), -20 and 30 (class 1) and, too far to count, three of class 0."""
    train, labels = at_angles(10, -20, 30, 60, 70, -80), torch.tensor([2, 1, 1, 0, 0, 0])
    lengths = torch.tensor([3.0, 0.5, 2.0, 9.0, 9.0, 9.0])[:, None]  # cosine does not see them
    scores = knn_predict(train * lengths, labels, 7 * at_angles(0), k=3, num_classes=4)
    cosines = {10: 0.984807753, 20: 0.939692621, 30: 0.866025404}
    vote = {angle: np.exp(cosine / 0.07) for angle, cosine in cosines.items()}
    assert scores[0].tolist() == pytest.approx([0, vote[20] + vote[30], vote[10], 0], rel=1e-6)
    assert scores.argmax().item() == 2  # one near neighbour outweighs two further ones ...
    scores = knn_predict(train, labels, at_angles(0), k=3, num_classes=4, temperature=0.7)
    assert scores.argmax().item() == 1  # ... unless the temperature is high


@pytest.mark.parametrize("k", [1, 3, 10, 20, 60, 200])
def test_votes_equal_scikit_learns(k):
    """k = 200 is more than there are training images, and is cut to all of them."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    train, queries = rng.normal(size=(60, 8)), rng.normal(size=(37, 8))
    labels = rng.integers(0, 5, 60)
    reference = neighbors.KNeighborsClassifier(
        min(k, 60), weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
    ).fit(train, labels)
    arguments = (torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(queries))
    scores = knn_predict(*arguments, k=k, num_classes=5)
    expected = torch.from_numpy(reference.predict_proba(queries))
    assert torch.allclose(scores / scores.sum(1, keepdim=True), expected, atol=1e-5)
    assert torch.equal(scores.argmax(1), torch.from_numpy(reference.predict(queries)))


@pytest.mark.parametrize("train_images, sizes", [(60, [10, 10, 10, 7]), (1000, 37 * [1]), (5, [37])])
def test_the_memory_of_the_search_is_bounded(monkeypatch, train_images, sizes):
    """At most 600 similarities at a time, or one query; votes are as if they were computed at once."""
    torch.manual_seed(0)
    arguments = torch.randn(train_images, 8), torch.randint(5, (train_images,)), torch.randn(37, 8)
    whole = knn_predict(*arguments, k=3, num_classes=5)
    found, real = [], knn.nearest_neighbors
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 600, raising=False)
    monkeypatch.setattr(knn, "nearest_neighbors", lambda train, x, k: found.append(len(x)) or real(train, x, k))
    assert torch.allclose(knn_predict(*arguments, k=3, num_classes=5), whole, rtol=1e-4)
    assert found == sizes


def test_no_queries_have_no_votes():
    assert knn_predict(torch.randn(4, 8), torch.arange(4), torch.empty(0, 8), k=3, num_classes=4).shape == (0, 4)


def test_prototypes_are_found_and_shuffled_labels_are_not():
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    train, queries = (torch.eye(10)[labels] + 0.05 * torch.randn(200, 10) for _ in range(2))
    hits = (knn_predict(train, labels, queries, 20, 10).argmax(1) == labels).float().mean()
    assert hits == 1
    shuffled = labels[torch.randperm(200)]
    assert (knn_predict(train, shuffled, queries, 20, 10).argmax(1) == labels).float().mean() < 0.3


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


def test_flags_that_agree_are_accepted_and_hp1_keeps_its_spelling(checkpoint):
    flags = ("--arch", "vit_micro", "--patch_size", 8, "--net", "CLeVER", "--hp1", "0.80", "--img_size", 64)
    pretrained = load(checkpoint, *flags)
    assert pretrained.hp1 == 0.8 and str(pretrained.hp1) == f"{pretrained.hp1}" == "0.80" and pretrained.img_size == 64


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--arch", "vit_tiny"), "--arch vit_tiny: the checkpoint was made with arch vit_micro"),
        (("--patch_size", 16), "--patch_size 16: the checkpoint was made with patch_size 8"),
        (("--net", "dino"), "--net dino: the checkpoint was made with net CLeVER"),
        (("--hp1", "0.5"), "--hp1 0.5: the checkpoint was made with hp1 0.8"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_errors(checkpoint, flags, message):
    with pytest.raises(InputError, match=message):
        load(checkpoint, *flags)


def test_a_bare_state_dict_needs_the_flags(checkpoint, tmp_path):
    torch.save(torch.load(checkpoint, weights_only=True)["teacher"], tmp_path / "bare.pth")
    flags = ("--arch", "vit_micro", "--patch_size", 8)
    pretrained = load(tmp_path / "bare.pth", *flags)
    assert pretrained.net == "dino" and pretrained.hp1 == 1.0 and pretrained.epochs is None and pretrained.img_size == 32
    assert pretrained.fingerprint == load(checkpoint).fingerprint
    assert load(tmp_path / "bare.pth", *flags, "--net", "CLeVER", "--hp1", 0.6).hp1 == 0.6
    with pytest.raises(InputError, match="--hp1: the checkpoint does not say"):
        load(tmp_path / "bare.pth", *flags, "--net", "CLeVER")


def test_the_record_holds_the_seed_of_the_pretraining(checkpoint, tmp_path):
    """Old checkpoints do not say it."""
    content = torch.load(checkpoint, weights_only=True)
    content["args"]["seed"] = 3
    torch.save(content, tmp_path / "seed.pth")
    assert [load(path).record()["pretraining_seed"] for path in (checkpoint, tmp_path / "seed.pth")] == [None, 3]


def test_the_fingerprint_is_of_the_weights(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["teacher"]["module.backbone.cls_token"][0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    prints = [load(path).fingerprint for path in (checkpoint, checkpoint, tmp_path / "other.pth")]
    assert prints[0] == prints[1] != prints[2]


def test_the_patch_size_of_timms_models_is_in_their_name(tmp_path):
    pytest.importorskip("timm")
    backbone = build_backbone("vit_small_patch8_224", img_size=32)
    arguments = {"arch": "vit_small_patch8_224", "patch_size": 16, "net": "dino", "global_crops_size": 32}
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"teacher": state, "args": arguments, "epoch": 1}, tmp_path / "timm.pth")
    assert load(tmp_path / "timm.pth").img_size == 32


@pytest.mark.parametrize("part, flag", [("IR", "main_part"), ("EF", "else_part")])
def test_parts_that_do_not_exist(part, flag):
    check_part("ALL", "dino", 1.0, 128)
    check_part(part, "CLeVER", 0.8, 128)
    with pytest.raises(InputError, match=f"{flag}: a dino checkpoint has no parts"):
        check_part(part, "dino", 0.8, 128)
    with pytest.raises(InputError, match="hp1 1.0: leaves the IR or the EF"):
        check_part(part, "CLeVER", 1.0, 128)
    with pytest.raises(InputError, match="hp1 0.001: leaves the IR or the EF"):
        check_part(part, "CLeVER", 0.001, 128)
