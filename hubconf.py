"""Entry point of torch.hub: a pretrained backbone in one line, from a clone of this repository.

network, transform, split = torch.hub.load("path/to/clone", "backbone", "checkpoint.pth", source="local")
"""

dependencies = ["torch", "torchvision", "numpy", "PIL", "einops", "yaml"]


def backbone(path: str, *args, **options):
    """The pretrained backbone of a checkpoint in eval mode, its transform (PIL image -> [3, S, S]), and split(z) -> IR, EF.

    Arguments: see clever.load_backbone.
    """
    from clever import load_backbone

    return load_backbone(path, *args, **options)
