"""Folders that are made of links to, or copies of, the files of another folder."""

import shutil
from pathlib import Path


def lay_out(root: Path, sources: dict[str, Path], copy: bool) -> None:
    """Link or copy {place below root: file or folder}, but for what is there already.

    A copy gets its name when it is whole (before, it ends in .part), so that a second call can go on.
    """
    for place, source in sources.items():
        target = root / place
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not copy:
            target.symlink_to(source, target_is_directory=source.is_dir())
            continue
        part = target.with_name(f"{target.name}.part")
        if source.is_dir():
            shutil.copytree(source, part, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, part)
        part.rename(target)
