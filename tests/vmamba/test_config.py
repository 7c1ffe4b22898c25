"""VMamba's configurations: files found by name, their keys and values, and the rate that pretraining takes from them."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.in_process import assert_refused, pretrain
from support.processes import write_images

import main_dino
import vmamba.config
from clever.models.backbones import backbone_names, build_backbone, is_ours
from clever.training.build import build_network
from clever.utils import InputError
from vmamba import build_vssm, config_names, load_config, parse_config, read_config

TINY = "vssm2-vmambav2_tiny_224"
SHIPPED = {
    "vssm2-vmambav2_micro",
    TINY,
    "vssm2-vmambav2_small_224",
    "vssm2-vmambav2_base_224",
    "vssm2-vmambav2_tiny_s2l5_224",
    "vssm-vmamba_tiny_224",
}


def last_drop_path(network):
    return network.layers[-1].blocks[-1].drop_path.p


def content(**changes):
    return {"MODEL": {"DROP_PATH_RATE": 0.2, "VSSM": {"DEPTHS": [1, 1], "SSM_FORWARDTYPE": "v05_noz"} | changes}}


def test_missing_keys_have_the_originals_defaults():
    config = parse_config({"MODEL": {"VSSM": {"DEPTHS": [2, 2, 8, 2], "SSM_FORWARDTYPE": "v0"}}})
    assert config.drop_path_rate == 0.1 and config.dims == [96, 192, 384, 768]
    assert (config.ssm_d_state, config.ssm_ratio, config.ssm_dt_rank, config.ssm_conv_bias) == (16, 2.0, "auto", True)
    assert (config.norm_layer, config.downsample, config.patchembed, config.mlp_ratio) == ("ln", "v2", "v2", 4.0)
    rates = {name: load_config(f"vssm2-vmambav2_{name}_224").drop_path_rate for name in ("tiny", "small", "base")}
    assert rates == {"tiny": 0.2, "small": 0.3, "base": 0.6}


def test_type_and_name_in_the_originals_files_are_ignored():
    with_names = content()
    with_names["MODEL"] |= {"TYPE": "vssm", "NAME": "vmambav2_tiny_224"}
    assert parse_config(with_names) == parse_config(content())
    with_names["MODEL"]["TYPE"] = "swin"
    with pytest.raises(InputError, match="MODEL.TYPE 'swin': must be vssm"):
        parse_config(with_names)


@pytest.mark.parametrize(
    "key, value, choices",
    [
        ("DEPTHS", [2, 0], "whole numbers of 1 or more"),
        ("DEPTHS", 2, "a list"),
        ("DEPTHS", [], "a list"),
        ("EMBED_DIM", 96.0, "whole number"),
        ("EMBED_DIM", True, "whole number"),
        ("EMBED_DIM", [8, 16, 32], "one for each of 2 stages"),
        ("PATCH_SIZE", 8, "4$"),
        ("IN_CHANS", 0, "1 or more"),
        ("SSM_D_STATE", 0, "1 or more"),
        ("SSM_RATIO", 0, "greater than 0"),
        ("SSM_RATIO", "2.0", "greater than 0"),
        ("SSM_RATIO", 0.01, "a channel"),
        ("SSM_RATIO", math.inf, "greater than 0"),
        ("SSM_DT_RANK", "all", "auto, or a whole number"),
        ("SSM_DT_RANK", 0, "auto, or a whole number"),
        ("SSM_ACT_LAYER", "tanh", "silu or gelu or relu"),
        ("SSM_CONV", 4, "odd"),
        ("SSM_CONV", True, "odd"),
        ("SSM_CONV_BIAS", "false", "true or false"),
        ("SSM_CONV_BIAS", 0, "true or false"),
        ("SSM_DROP_RATE", 1.0, r"\[0, 1\)"),
        ("MLP_DROP_RATE", -0.1, r"\[0, 1\)"),
        ("SSM_INIT", "v1", "v0"),
        ("SSM_FORWARDTYPE", "v2", "v0 or v05 or v05_noz"),
        ("SSM_FORWARDTYPE", "xv1a", "v0 or v05 or v05_noz"),
        ("MLP_RATIO", math.nan, "0 or more"),
        ("MLP_RATIO", -1, "0 or more"),
        ("MLP_ACT_LAYER", ["gelu"], "silu or gelu or relu"),
        ("PATCH_NORM", None, "true or false"),
        ("NORM_LAYER", "rms", "ln or ln2d or bn"),
        ("DOWNSAMPLE", "none", "v1 or v2 or v3"),
        ("PATCHEMBED", "v3", "v1 or v2"),
        ("GMLP", 1, "true or false"),
    ],
)
def test_wrong_values_name_the_key_and_the_choices(key, value, choices):
    with pytest.raises(InputError, match=f"^{key} .*: must be .*{choices}") as error:
        parse_config(content(**{key: value}))
    assert "\n" not in str(error.value)


def test_a_missing_forward_type_is_an_error():
    with pytest.raises(InputError, match="SSM_FORWARDTYPE 'v2': must be v0 or v05 or v05_noz"):
        parse_config({"MODEL": {"VSSM": {"DEPTHS": [1]}}})


@pytest.mark.parametrize(
    "contents, message",
    [
        (content(SSM_RATOI=1), "MODEL.VSSM: unknown key 'SSM_RATOI'; choose among .*SSM_RATIO"),
        ({"MODEL": {"VSSM": {"DEPTHS": [1]}, "WIDTH": 3}}, "MODEL: unknown key 'WIDTH'.*DROP_PATH_RATE"),
        ({"TRAIN": {}}, "unknown key 'TRAIN'.*MODEL"),
        ({"MODEL": {"VSSM": {"EMBED_DIM": 8}}}, "DEPTHS is missing"),
        ({"MODEL": {"DROP_PATH_RATE": 0.1}}, "MODEL.VSSM: must be a mapping"),
        ({"MODEL": {"DROP_PATH_RATE": 1, "VSSM": {"DEPTHS": [1], "SSM_FORWARDTYPE": "v0"}}}, r"DROP_PATH_RATE 1: .*\[0, 1\)"),
        ([1, 2], "must be a mapping"),
        (None, "must be a mapping"),
    ],
)
def test_contents_that_are_not_a_configuration(contents, message):
    with pytest.raises(InputError, match=message):
        parse_config(contents)


@pytest.mark.parametrize("text", [b"MODEL: [1, 2\n", b"\xff\xfe\x00", None])
def test_files_that_are_not_a_configuration_are_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(InputError, match="broken.yaml: (is not YAML|cannot be read)") as error:
        read_config(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of the configurations, where tests may add files."""
    monkeypatch.setattr(vmamba.config, "CONFIGS", tmp_path / "configs")
    return shutil.copytree(Path(vmamba.config.__file__).parent / "configs", tmp_path / "configs")


def add_small(configs, folder="mine", name="small-one", **changes):
    values = {"DEPTHS": [1, 1], "EMBED_DIM": 8, "SSM_D_STATE": 1, "SSM_FORWARDTYPE": "v05_noz"} | changes
    (configs / folder).mkdir(exist_ok=True)
    (configs / folder / f"{name}.yaml").write_text(yaml.safe_dump({"MODEL": {"DROP_PATH_RATE": 0.4, "VSSM": values}}))


@pytest.mark.parametrize("folder", ["mine", "vssm2"])
def test_a_file_added_to_the_others_is_found(configs, folder):
    arch = f"{folder}-small-one"
    add_small(configs, folder)
    assert is_ours(arch) and arch in config_names() and TINY in config_names()
    assert build_backbone(arch, drop_path_rate=None).embed_dim == 16
    assert last_drop_path(build_backbone(arch, drop_path_rate=None)) == pytest.approx(0.4)
    assert last_drop_path(build_backbone(arch)) == 0
    assert build_backbone(arch, checkpointing=True).layers[0].checkpointing


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=f"unknown VMamba 'vssm2-vmambav2_huge_224': choose one of .*{TINY}"):
        build_backbone("vssm2-vmambav2_huge_224")
    with pytest.raises(InputError, match=f"unknown arch 'vssm7-tiny'.*{TINY}"):
        build_backbone("vssm7-tiny")
    with pytest.raises(InputError, match="unknown VMamba '../vssm2"):
        build_vssm("../vssm2-vmambav2_tiny_224")
    assert SHIPPED == set(config_names()) <= set(backbone_names())
    assert not is_ours("vssm7-tiny") and not is_ours("resnet34")


def test_student_takes_the_configs_rate_unless_the_flag_is_given(configs, tmp_path):
    add_small(configs)
    images = write_images(tmp_path / "images", 4)
    for flags, rate in (((), 0.4), (("--drop_path_rate", 0.1), 0.1)):
        folder = tmp_path / f"run{rate}"
        outcome = pretrain(images, folder, "--arch", "mine-small-one", *flags)
        assert outcome.status == 0, outcome
        state = torch.load(folder / "checkpoint.pth", weights_only=True)
        assert state["args"]["drop_path_rate"] == rate
        args = main_dino.get_args_parser().parse_args(["--data_path", "unused", "--arch", "mine-small-one", *map(str, flags)])
        student = build_network(args, args.drop_path_rate)
        teacher = build_network(args, 0.0)
        assert last_drop_path(student.backbone) == rate and last_drop_path(teacher.backbone) == 0

    again = pretrain(images, tmp_path / "run0.4", "--arch", "mine-small-one", "--epochs", 2)
    assert again.status == 0 and "changed arguments: epochs 1 -> 2\n" in again.stdout
    refused = pretrain(images, tmp_path / "other", "--arch", "mine-large")
    assert_refused(refused, "unknown VMamba 'mine-large'", "mine-small-one")
