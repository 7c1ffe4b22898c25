"""The objectives of pretraining: METHODS says what each --net needs.

A new one is a file in this folder and a row of the table.
"""

from clever.methods.clever import CLeVERLoss
from clever.methods.dino import DINOLoss

METHODS: dict[str, type[DINOLoss]] = {"dino": DINOLoss, "CLeVER": CLeVERLoss}
