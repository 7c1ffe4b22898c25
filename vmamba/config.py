"""VMamba's configurations: YAML files with the original's keys, found by name.

The architecture `<folder>-<config>` is the file vmamba/configs/<folder>/<config>.yaml. To add one, add a file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from clever.utils import InputError, error_prefix, short_repr

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class VSSMConfig:
    """Sizes and variants of a VMamba. The keys of a file are these names in capitals; defaults are the original's.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """

    depths: tuple[int, ...]  # blocks per stage
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
        for name, (is_valid, expected) in CHECKS.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise InputError(f"{name.upper()} {short_repr(value)}: must be {expected}")
        if not isinstance(self.embed_dim, int) and len(self.embed_dim) != len(self.depths):
            raise InputError(f"EMBED_DIM {self.embed_dim!r}: must be one number, or one for each of {len(self.depths)} stages")
        if self.ssm_ratio * min(self.dims) < 1:
            raise InputError(f"SSM_RATIO {self.ssm_ratio!r}: must be enough for a channel, EMBED_DIM is {self.embed_dim!r}")

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


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda value: not isinstance(value, bool) and value in choices, " or ".join(map(str, choices))


RATE = (lambda value: _is_number(value) and 0 <= value < 1), "a number in [0, 1)"
FLAG = (lambda value: isinstance(value, bool)), "true or false"
COUNT = (lambda value: _is_int(value, 1)), "a whole number of 1 or more"
ACTIVATION = _one_of("silu", "gelu", "relu")

CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "depths": (lambda value: _are_ints(value, 1), "a list of whole numbers of 1 or more"),
    "drop_path_rate": RATE,
    "patch_size": _one_of(4),
    "in_chans": COUNT,
    "embed_dim": (
        lambda value: _is_int(value, 2) or _are_ints(value, 2),
        "a whole number of 2 or more, or a list of them",
    ),
    "ssm_d_state": COUNT,
    "ssm_ratio": (lambda value: _is_number(value) and value > 0, "a number greater than 0"),
    "ssm_dt_rank": (lambda value: value == "auto" or _is_int(value, 1), "auto, or a whole number of 1 or more"),
    "ssm_act_layer": ACTIVATION,
    "ssm_conv": (
        lambda value: _is_int(value) and (value <= 1 or value % 2 == 1),
        "an odd whole number, or 1 or less for no convolution",
    ),
    "ssm_conv_bias": FLAG,
    "ssm_drop_rate": RATE,
    "ssm_init": _one_of("v0"),
    "ssm_forwardtype": _one_of("v0", "v05", "v05_noz"),
    "mlp_ratio": (lambda value: _is_number(value) and value >= 0, "a number of 0 or more"),
    "mlp_act_layer": ACTIVATION,
    "mlp_drop_rate": RATE,
    "patch_norm": FLAG,
    "norm_layer": _one_of("ln", "ln2d", "bn"),
    "downsample": _one_of("v1", "v2", "v3"),
    "patchembed": _one_of("v1", "v2"),
    "gmlp": FLAG,
}


def parse_config(content: Any) -> VSSMConfig:
    """Configuration from the contents of a file, `{"MODEL": {"DROP_PATH_RATE": ..., "VSSM": {...}}}`.

    Raises:
        InputError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    model = _mapping("the file", content, {"MODEL"}).get("MODEL")
    model = _mapping("MODEL", model, {"DROP_PATH_RATE", "VSSM", "TYPE", "NAME"})  # the original's files have a type and a name
    if model.get("TYPE", "vssm") != "vssm":
        raise InputError(f"MODEL.TYPE {model['TYPE']!r}: must be vssm")
    known = {field.name.upper() for field in fields(VSSMConfig)} - {"DROP_PATH_RATE"}
    values = dict(_mapping("MODEL.VSSM", model.get("VSSM"), known))
    if "DEPTHS" not in values:
        raise InputError("MODEL.VSSM.DEPTHS is missing: the blocks per stage, such as [2, 2, 8, 2]")
    if "DROP_PATH_RATE" in model:
        values["DROP_PATH_RATE"] = model["DROP_PATH_RATE"]
    return VSSMConfig(**{key.lower(): tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _mapping(where: str, content: Any, known: set[str]) -> dict[str, Any]:
    """Returns `content`; raises InputError unless it is a mapping with known keys only."""
    choices = ", ".join(sorted(known))
    if not isinstance(content, dict):
        raise InputError(f"{where}: must be a mapping with keys among {choices}, not {short_repr(content)}")
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; choose among {choices}")
    return content


def read_config(path: str | Path) -> VSSMConfig:
    """Configuration from a YAML file. Raises InputError naming the file if it cannot be read or is not a configuration."""
    with error_prefix(str(path)):
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read ({error})") from error
        except yaml.YAMLError as error:
            raise InputError(f"is not YAML: {' '.join(str(error).split())}") from error
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
