"""Launch scripts, and commands that are run from the root as `python -m scripts.<name>`."""
