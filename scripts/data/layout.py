"""A new output folder that consists of links to, or copies of, existing files and folders."""

import shutil
from pathlib import Path

from clever.utils import InputError, whole_folder


def link_or_copy(root: Path, sources: dict[str, Path], copy: bool) -> None:
    """Make `root` with all `sources`, {path below root: existing file or folder}: whole, or nothing if that is interrupted.

    Raises InputError unless `root` is new or empty.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"--out {root}: exists; choose a new or empty folder")
    with whole_folder(root) as folder:
        for path, source in sources.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not copy:
                target.symlink_to(source, target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copyfile(source, target)
