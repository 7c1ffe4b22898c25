"""VMamba's configurations: files found by name, their keys and values, and the rate that pretraining takes from them."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.in_process import assert_refused, pretrain
from support.processes import write_images

import main_dino
import vmamba.config
from clever.models.backbones import build_backbone, is_ours
from clever.training.build import build_network
from clever.utils import InputError
from vmamba import config_names, load_config, parse_config, read_config

TINY = "vssm2-vmambav2_tiny_224"


def last_drop_path(network):
    return network.layers[-1].blocks[-1].drop_path.p


def content(**changes):
    return {"MODEL": {"DROP_PATH_RATE": 0.2, "VSSM": {"DEPTHS": [1, 1], "SSM_FORWARDTYPE": "v05_noz"} | changes}}


def test_missing_keys_have_the_originals_defaults():
    config = parse_config({"MODEL": {"TYPE": "vssm", "VSSM": {"DEPTHS": [2, 2, 8, 2], "SSM_FORWARDTYPE": "v0"}}})
    assert config.drop_path_rate == 0.1 and config.dims == [96, 192, 384, 768]
    assert (config.ssm_d_state, config.ssm_ratio, config.ssm_dt_rank, config.ssm_conv_bias) == (16, 2.0, "auto", True)
    assert (config.norm_layer, config.downsample, config.patchembed, config.mlp_ratio) == ("ln", "v2", "v2", 4.0)
    rates = {name: load_config(f"vssm2-vmambav2_{name}_224").drop_path_rate for name in ("tiny", "small", "base")}
    assert rates == {"tiny": 0.2, "small": 0.3, "base": 0.6}


@pytest.mark.parametrize(
    "key, value, choices",
    [
        ("DEPTHS", [2, 0], "whole numbers of 1 or more"),
        ("SSM_DT_RANK", "all", "auto, or a whole number"),
        ("SSM_FORWARDTYPE", "xv1a", "v0 or v05 or v05_noz"),
    ],
)
def test_wrong_values_name_the_key_and_the_choices(key, value, choices):
    with pytest.raises(InputError, match=f"^{key} .*: must be .*{choices}") as error:
        parse_config(content(**{key: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "contents, message",
    [
        (content(SSM_RATOI=1), r"MODEL.VSSM: must be a mapping with keys among .*SSM_RATIO.*, not \['SSM_RATOI'\]"),
        ({"MODEL": {"VSSM": {"EMBED_DIM": 8}}}, "DEPTHS .*: must be a list"),
    ],
)
def test_contents_that_are_not_a_configuration(contents, message):
    with pytest.raises(InputError, match=message):
        parse_config(contents)


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_bytes(b"MODEL: [1, 2\n")
    with pytest.raises(InputError, match="broken.yaml: cannot be read as YAML") as error:
        read_config(tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of the configurations, with one more: mine-small-one."""
    folder = shutil.copytree(Path(vmamba.config.__file__).parent / "configs", tmp_path / "configs")
    values = {"DEPTHS": [1, 1], "EMBED_DIM": 8, "SSM_D_STATE": 1, "SSM_FORWARDTYPE": "v05_noz"}
    (folder / "mine").mkdir()
    (folder / "mine" / "small-one.yaml").write_text(yaml.safe_dump({"MODEL": {"DROP_PATH_RATE": 0.4, "VSSM": values}}))
    monkeypatch.setattr(vmamba.config, "CONFIGS", folder)


def test_a_file_added_to_the_others_is_found(configs):
    arch = "mine-small-one"
    assert is_ours(arch) and arch in config_names() and TINY in config_names()
    assert build_backbone(arch, drop_path_rate=None).embed_dim == 16
    assert last_drop_path(build_backbone(arch, drop_path_rate=None)) == pytest.approx(0.4)
    assert last_drop_path(build_backbone(arch)) == 0
    assert build_backbone(arch, checkpointing=True).layers[0].checkpointing


def test_student_takes_the_configs_rate_unless_the_flag_is_given(configs, tmp_path):
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

    refused = pretrain(images, tmp_path / "other", "--arch", "mine-large")
    assert_refused(refused, "unknown VMamba 'mine-large'", "mine-small-one")
