"""The original's name of clever/models/vision_transformer.py."""

from clever.models.vision_transformer import *  # noqa: F403
