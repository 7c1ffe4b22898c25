"""VMamba: the network, its configurations, and its 2D selective scan."""

from vmamba.config import VSSMConfig, config_names, is_config_name, load_config, parse_config, read_config
from vmamba.model import VSSM, build_vssm

__all__ = [
    "VSSM",
    "VSSMConfig",
    "build_vssm",
    "config_names",
    "is_config_name",
    "load_config",
    "parse_config",
    "read_config",
]
