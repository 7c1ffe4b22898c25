"""What several evaluations share: the pretrained network, its features and parts, k-NN, the probe.

`from evaluation import load_backbone` is for users' own code, see loading.py.
"""


def __getattr__(name: str):
    """`load_backbone` is imported when it is asked for: some scripts import only names.py, which must stay fast."""
    if name == "load_backbone":
        from evaluation.loading import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
