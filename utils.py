"""The original's name of clever/utils.py."""

from clever.utils import *  # noqa: F403
