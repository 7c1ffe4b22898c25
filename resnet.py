"""The original's name of clever/models/resnet.py."""

from clever.models.resnet import *  # noqa: F403
