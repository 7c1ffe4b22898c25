"""VMamba: the network, its configurations, and its 2D selective scan.

What needs the scan is imported when it is asked for: a name of a configuration can be looked up without it.
"""

from typing import Any

from vmamba.config import VSSMConfig, config_names, is_config_name, load_config, parse_config, read_config

__all__ = ["VSSM", "VSSMConfig", "build_vssm", "config_names", "is_config_name", "load_config", "parse_config", "read_config"]


def __getattr__(name: str) -> Any:
    if name in ("VSSM", "build_vssm"):
        from vmamba import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
