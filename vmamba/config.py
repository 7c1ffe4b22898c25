"""VMamba's configurations: YAML files with the original's keys, found by name.

The architecture `<folder>-<config>` is the file vmamba/configs/<folder>/<config>.yaml. To add one, add a file.
"""

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from clever.utils import InputError, error_prefix

CONFIGS = Path(__file__).parent / "configs"
Check = tuple[str, str, Callable[[Any], bool]]  # names of values, what they must be, the test of it


@dataclass(frozen=True)
class VSSMConfig:
    """Sizes and variants of a VMamba. The keys of a file are these names in capitals; defaults are the original's.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """

    depths: tuple[int, ...] = ()  # blocks per stage; required
    drop_path_rate: float = 0.1  # stochastic depth rate of the last block
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int | tuple[int, ...] = 96  # channels of each stage, or of the first: doubled from stage to stage
    ssm_d_state: int = 16  # states per channel
    ssm_ratio: float = 2.0  # channels of the scan divided by channels of the block
    ssm_dt_rank: int | str = "auto"  # auto: ceil(channels / 16)
    ssm_act_layer: str = "silu"
    ssm_conv: int = 3  # kernel size of the depthwise convolution; 1 or less: no convolution
    ssm_conv_bias: bool = True
    ssm_drop_rate: float = 0.0
    ssm_init: str = "v0"
    ssm_forwardtype: str = "v2"
    mlp_ratio: float = 4.0  # 0: blocks without MLP
    mlp_act_layer: str = "gelu"
    mlp_drop_rate: float = 0.0
    patch_norm: bool = True
    norm_layer: str = "ln"
    downsample: str = "v2"
    patchembed: str = "v2"
    gmlp: bool = False  # the gated form of the MLP

    def __post_init__(self) -> None:
        checks = [*CHECKS, ("embed_dim", "one number, or one for each stage", lambda _: len(self.dims) == len(self.depths))]
        for names, expected, is_valid in checks:
            for name in names.split():
                if not is_valid(getattr(self, name)):
                    raise InputError(f"{name.upper()} {reprlib.repr(getattr(self, name))}: must be {expected}")

    @property
    def dims(self) -> list[int]:
        """Channels per stage."""
        if isinstance(self.embed_dim, int):
            return [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        return list(self.embed_dim)


def _is_int(value: Any, low: float = -math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _are_ints(value: Any, low: float) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(_is_int(v, low) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(names: str, *choices: Any) -> Check:
    return names, " or ".join(map(str, choices)), lambda value: not isinstance(value, bool) and value in choices


CHECKS: list[Check] = [
    ("depths", "a list of whole numbers of 1 or more", lambda value: _are_ints(value, 1)),
    ("embed_dim", "a whole number of 2 or more, or a list of them", lambda value: _is_int(value, 2) or _are_ints(value, 2)),
    ("in_chans ssm_d_state", "a whole number of 1 or more", lambda value: _is_int(value, 1)),
    ("ssm_ratio", "a number greater than 0", lambda value: _is_number(value) and value > 0),
    ("ssm_dt_rank", "auto, or a whole number of 1 or more", lambda value: value == "auto" or _is_int(value, 1)),
    ("ssm_conv", "an odd whole number, or 1 or less", lambda value: _is_int(value) and (value <= 1 or value % 2 == 1)),
    ("mlp_ratio", "a number of 0 or more", lambda value: _is_number(value) and value >= 0),
    ("drop_path_rate ssm_drop_rate mlp_drop_rate", "a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    ("ssm_conv_bias patch_norm gmlp", "true or false", lambda value: isinstance(value, bool)),
    _one_of("patch_size", 4),
    _one_of("ssm_act_layer mlp_act_layer", "silu", "gelu", "relu"),
    _one_of("ssm_init", "v0"),
    _one_of("ssm_forwardtype", "v0", "v05", "v05_noz"),
    _one_of("norm_layer", "ln", "ln2d", "bn"),
    _one_of("downsample", "v1", "v2", "v3"),
    _one_of("patchembed", "v1", "v2"),
]


def parse_config(content: Any) -> VSSMConfig:
    """Configuration from the contents of a file, `{"MODEL": {"DROP_PATH_RATE": ..., "VSSM": {...}}}`.

    Raises:
        InputError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    model = _mapping("the file", content, {"MODEL"}).get("MODEL")
    model = _mapping("MODEL", model, {"DROP_PATH_RATE", "VSSM", "TYPE", "NAME"})  # the original's files have a type and a name
    known = {field.name.upper() for field in fields(VSSMConfig)} - {"DROP_PATH_RATE"}
    values = dict(_mapping("MODEL.VSSM", model.get("VSSM"), known))
    if "DROP_PATH_RATE" in model:
        values["DROP_PATH_RATE"] = model["DROP_PATH_RATE"]
    return VSSMConfig(**{key.lower(): tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _mapping(where: str, content: Any, known: set[str]) -> dict[str, Any]:
    """Returns `content`; raises InputError unless it is a mapping with known keys only."""
    unknown = [key for key in content if key not in known] if isinstance(content, dict) else content
    if unknown or not isinstance(content, dict):
        raise InputError(f"{where}: must be a mapping with keys among {', '.join(sorted(known))}, not {reprlib.repr(unknown)}")
    return content


def read_config(path: str | Path) -> VSSMConfig:
    """Configuration from a YAML file. Raises InputError naming the file if it cannot be read or is not a configuration."""
    with error_prefix(str(path)):
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot be read as YAML ({' '.join(str(error).split())})") from error
        return parse_config(content)


def config_names() -> list[str]:
    """Sorted names `<folder>-<config>` of all configuration files."""
    return sorted(f"{path.parent.name}-{path.stem}" for path in CONFIGS.glob("*/*.yaml"))


def is_config_name(name: str) -> bool:
    """True if `name` is `<folder>-<config>` with an existing folder, whether or not it holds such a file."""
    return "-" in name and name.split("-", 1)[0] in {path.parent.name for path in CONFIGS.glob("*/*.yaml")}


def load_config(name: str) -> VSSMConfig:
    """Configuration of the architecture `<folder>-<config>`.

    Raises:
        InputError: there is no such file (the message lists the existing ones), or it is not a configuration.
    """
    if name not in config_names():
        raise InputError(f"unknown VMamba {name!r}: choose one of {', '.join(config_names())} (files of {CONFIGS.name}/)")
    folder, config = name.split("-", 1)
    return read_config(CONFIGS / folder / f"{config}.yaml")
