"""export.py: every format in a process without this repository, parts, the sidecar and the card, bad input."""

import json
import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.in_process import assert_refused, call

import export
from clever.evaluation.export_formats import FORMATS, Network, timm_model
from clever.models.backbones import BACKBONES, build_backbone
from clever.models.vision_transformer import VisionTransformer
from vmamba import VSSMConfig, build_vssm

SIZE = 16
TRAINING = {"patch_size": 8, "net": "CLeVER", "hp1": 0.8, "global_crops_size": SIZE, "aug": "aug1_2", "seed": 3}
TRAINING |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]}
# vit_test has 64 columns, resnet18 512.
PARTS = {"vit_test": {"ALL": (0, 64), "main_part": (0, 51), "else_part": (51, 64)}}
PARTS["resnet18"] = {"ALL": (0, 512), "main_part": (0, 409), "else_part": (409, 512)}
EXPORTS = [  # arch, format, part, suffix
    ("vit_test", "timm", "ALL", "pth"),
    ("vit_test", "timm", "main_part", "safetensors"),
    ("vit_test", "safetensors", "else_part", "safetensors"),
    ("vit_test", "torch_export", "main_part", "pt2"),
    ("vit_test", "onnx", "main_part", "onnx"),
    ("resnet18", "timm", "else_part", "pth"),
    ("resnet18", "torchvision", "main_part", "pth"),
]
# What a user runs: nothing but the lines of the sidecar. `images` are there.
READER = """
import json, sys, torch
results = {}
for name in sys.argv[1:]:
    with open(name + ".json") as file:
        *load, compute = json.load(file)["usage"]
    space = {}
    exec("\\n".join(load), space)
    for batch, space["images"] in torch.load("images.pt").items():
        with torch.no_grad():
            exec(compute, space)
        results[name, batch] = torch.as_tensor(space["features"])
torch.save(results, "features.pt")
assert "clever" not in sys.modules
"""


@pytest.fixture(scope="module", autouse=True)
def vit_test():
    """A ViT of two blocks, which is traced in a second."""
    with mock.patch.dict(BACKBONES, vit_test=partial(VisionTransformer, embed_dim=64, depth=2, num_heads=4)):
        yield


def save_checkpoint(root, arch, img_size=SIZE):
    """A checkpoint whose weights, batch norm's statistics included, are random. Returns the backbone."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, patch_size=8, img_size=img_size).eval().requires_grad_(False)
    for name, value in backbone.state_dict().items():
        if name.endswith(("running_mean", "running_var", "bias", "norm.weight")):
            value.uniform_(0.5, 1.5)
    state = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    args = TRAINING | {"arch": arch, "global_crops_size": img_size}
    torch.save({"teacher": state, "args": args, "epoch": 7}, root / f"{arch}.pth")
    return backbone


def run_export(weights, *flags):
    return call(export.main, "--pretrained_weights", weights, *flags)


def exported_name(arch, kind, part, suffix):
    return f"{arch}_{kind}_{part}.{suffix}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoints, and one file of each kind in `out`."""
    root = tmp_path_factory.mktemp("export")
    backbones = {arch: save_checkpoint(root, arch) for arch in PARTS}
    outcomes = {}
    for arch, kind, part, suffix in EXPORTS:
        if kind == "onnx" and not all(map(installed, FORMATS["onnx"].packages)):
            continue
        name = exported_name(arch, kind, part, suffix)
        outcomes[name] = run_export(root / f"{arch}.pth", "--format", kind, "--part", part, "--out", root / "out" / name)
        assert outcomes[name].status == 0, outcomes[name]
    return SimpleNamespace(root=root, out=root / "out", backbones=backbones, outcomes=outcomes)


def installed(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def images():
    return {batch: torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch)) for batch in (1, 2, 5)}


def read_by_sidecars(folder, names, images):
    """Features of all files by the lines of their sidecars, in a process that does not know this repository."""
    torch.save(images, folder / "images.pt")
    # -I: neither the current folder nor PYTHONPATH is searched
    process = subprocess.run([sys.executable, "-I", "-c", READER, *names], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "features.pt")


@pytest.fixture(scope="module")
def read_elsewhere(world, images):
    return read_by_sidecars(world.out, world.outcomes, images)


@pytest.mark.parametrize("arch, kind, part, suffix", EXPORTS)
def test_a_process_without_this_repository_computes_the_same_features(world, images, read_elsewhere, arch, kind, part, suffix):
    name = exported_name(arch, kind, part, suffix)
    if name not in world.outcomes:
        pytest.skip("onnx, onnxruntime or onnxscript is not installed")
    first, end = PARTS[arch][part]
    for batch, x in images.items():
        expected = world.backbones[arch](x)[:, first:end]
        assert expected.std() > 0.05
        assert_equal_features(read_elsewhere[name, batch], expected)


def assert_equal_features(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("arch, kind, part, suffix", EXPORTS[1:3])
def test_the_sidecar_and_the_card_say_what_the_file_is(world, arch, kind, part, suffix):
    name = exported_name(arch, kind, part, suffix)
    record, card = json.loads((world.out / f"{name}.json").read_text()), (world.out / f"{name}.md").read_text()
    assert (record["format"], record["part"], record["arch"], record["file"]) == (kind, part, arch, name)
    assert record["columns"] == list(PARTS[arch][part]) and record["dim"] == 64 and record["hp1"] == 0.8
    assert (record["ir_columns"], record["ef_columns"]) == ([0, 51], [51, 64])
    expected = {"img_size": SIZE, "resize": 18, "interpolation": "bicubic", "mean": TRAINING["mean"], "std": TRAINING["std"]}
    assert record["input"] == expected
    assert (record["net"], record["pretrained_epochs"], record["pretraining_seed"]) == ("CLeVER", 7, 3)
    assert record["training_args"] == TRAINING | {"arch": arch} and 0 <= record["largest_difference"] <= 1e-5
    for text in (*record["usage"], record["backbone"], "[0.5, 0.4, 0.3]", str(record["columns"])):
        assert text in card


@pytest.mark.parametrize("arch, kind, part, suffix", [EXPORTS[1], EXPORTS[2], EXPORTS[5]])
def test_timm_s_own_data_configuration_is_that_of_the_pretraining(world, monkeypatch, arch, kind, part, suffix):
    timm, scope = pytest.importorskip("timm"), {}
    monkeypatch.chdir(world.out)
    exec(
        "\n".join(json.loads((world.out / f"{exported_name(arch, kind, part, suffix)}.json").read_text())["usage"][:-1]), scope
    )
    found = timm.data.resolve_model_data_config(scope["model"])
    expected = {"input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "crop_pct": 0.875}
    expected |= {name: tuple(TRAINING[name]) for name in ("mean", "std")}
    assert {name: found[name] for name in expected} == expected


def test_a_safetensors_file_can_be_evaluated_and_exported_again(world, tmp_path):
    """And has the usual permissions."""
    source = world.out / "vit_test_safetensors_else_part.safetensors"
    assert run_export(source, "--format", "timm", "--out", tmp_path / "again.pth").status == 0
    again, first = torch.load(tmp_path / "again.pth"), torch.load(world.out / "vit_test_timm_ALL.pth")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    assert {path.stat().st_mode for path in world.out.iterdir()} == {(world.root / "vit_test.pth").stat().st_mode}


@pytest.mark.parametrize("arch, name", [("vit_tiny", "vit_tiny"), ("deit_small", "vit_small"), ("vit_base", "vit_base")])
def test_timm_has_our_vits_under_its_own_names(arch, name):
    timm, sizes = pytest.importorskip("timm"), {"patch_size": 8, "img_size": 32}
    with torch.device("meta"):  # names and shapes only
        backbone = build_backbone(arch, **sizes)
        found = timm_model(Network(backbone, arch, 224, None, {}))
        assert found == {"name": f"{name}_patch16_224", "options": {"num_classes": 0, **sizes}}
        model = timm.create_model(found["name"], **found["options"])
    model.load_state_dict(backbone.state_dict())
    assert len(model.blocks) == len(backbone.blocks) and model.blocks[0].attn.num_heads == backbone.num_heads


@pytest.mark.parametrize("arch, size, options", [("test_vit", 64, {"img_size": 64}), ("test_convnext", 64, {})])
def test_timms_own_models_are_exported_to_timm(tmp_path, arch, size, options):
    pytest.importorskip("timm")
    save_checkpoint(tmp_path, arch, img_size=size)
    outcome = run_export(tmp_path / f"{arch}.pth", "--format", "timm", "--part", "main_part", "--out", tmp_path / "F.pth")
    assert outcome.status == 0, outcome
    model = json.loads((tmp_path / "F.pth.json").read_text())["model"]
    assert model == {"name": arch, "options": {"num_classes": 0, **options}}


def test_vmamba_becomes_a_program_without_our_operators(tmp_path):
    config = VSSMConfig(depths=(1,), embed_dim=8, ssm_d_state=2, ssm_ratio=1.0, ssm_conv_bias=False, mlp_ratio=0.0,
                        ssm_forwardtype="v05_noz", downsample="v3", norm_layer="ln2d")  # fmt: skip
    torch.manual_seed(0)
    network = Network(build_vssm(config).eval().requires_grad_(False), "vssm2-test", 12, (3, 7), {})
    FORMATS["torch_export"].write(network, tmp_path / "F.pt2")
    operators = {str(node.target) for node in torch.export.load(tmp_path / "F.pt2").graph.nodes}
    assert "aten.exp.default" in operators and not any("clever" in name for name in operators)
    assert export.largest_difference(network, FORMATS["torch_export"].usage(network, str(tmp_path / "F.pt2"))) < 1e-6


def test_programs_may_have_another_image_size_but_weights_may_not(world, tmp_path):
    flags = ("--img_size", 32, "--format")
    assert run_export(world.root / "vit_test.pth", *flags, "torch_export", "--out", tmp_path / "F.pt2").status == 0
    images = torch.randn(2, 3, 32, 32)
    features = torch.export.load(tmp_path / "F.pt2").module()(images)
    torch.testing.assert_close(features, world.backbones["vit_test"](images), rtol=0, atol=1e-5)
    outcome = run_export(world.root / "vit_test.pth", *flags, "timm", "--out", tmp_path / "F.pth")
    assert_refused(outcome, "--img_size 32", "16 pixels", "torch_export")


BAD = [  # checkpoint, flags, what the message must hold
    ("vit_test", "--format keras --out F.pth", "'keras'", "torch_export"),
    ("vit_test", "--format torchvision --out F.pth", "vit_test", "resnet18 and resnet50"),
    ("resnet8", "--format timm --out F.pth", "no resnet8", "safetensors, onnx or torch_export"),
    ("vit_test", "--format timm --out /proc/F.pth", "--out", "/proc", "cannot be written"),
]


@pytest.fixture(scope="module")
def bad_checkpoints(world):
    save_checkpoint(world.root, "resnet8")
    return world.root


@pytest.mark.parametrize("checkpoint, flags, mentioned", [(name, flags, mentioned) for name, flags, *mentioned in BAD])
def test_refuses(bad_checkpoints, tmp_path, monkeypatch, checkpoint, flags, mentioned):
    monkeypatch.chdir(tmp_path)
    outcome = run_export(bad_checkpoints / f"{checkpoint}.pth", *flags.split())
    assert_refused(outcome, *mentioned)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [1e-3, math.nan])
def test_a_file_that_gives_other_features_gets_no_name(world, tmp_path, monkeypatch, change):
    """One tensor of what the library reads is not what was written."""

    def write_other_weights(network, path):
        state = network.backbone.state_dict()
        torch.save(state | {"norm.bias": state["norm.bias"] + change}, path)

    monkeypatch.setitem(FORMATS, "timm", FORMATS["timm"]._replace(write=write_other_weights))
    outcome = run_export(world.root / "vit_test.pth", "--format", "timm", "--out", tmp_path / "F.pth")
    assert_refused(outcome, "--format timm", "vit_test", "choose another format")
    assert not list(tmp_path.iterdir())
