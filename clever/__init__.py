"""CLeVER: contrastive learning via equivariant representation. `load_backbone` is for users' own code."""

from clever.version import __version__ as __version__


def __getattr__(name: str):
    """`load_backbone` is imported when it is asked for: with it come torch and all networks."""
    if name == "load_backbone":
        from clever.evaluation.loading import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
