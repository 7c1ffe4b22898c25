"""Output folders that consist of links to, or copies of, existing files and folders.

`sources` is {path below the output folder: existing file or folder}.
"""

import shutil
from pathlib import Path

from utils import InputError


def check_output(root: Path, sources: dict[str, Path], copy: bool) -> None:
    """Raise InputError unless `root` contains nothing but what link_or_copy puts there; missing files are fine."""
    if root.exists() and not root.is_dir():
        raise InputError(f"--out {root}: is not a folder")
    folders = {parent.as_posix() for path in sources for parent in Path(path).parents}
    to_check = sorted(root.glob("*"))
    while to_check:
        entry = to_check.pop(0)
        path = entry.relative_to(root).as_posix()
        source = sources.get(path.removesuffix(".part") if copy else path)
        if entry.is_symlink():
            expected = not copy and source is not None and entry.resolve() == source
        elif path in folders:
            expected = entry.is_dir()
            to_check += sorted(entry.glob("*"))
        else:
            expected = copy and source is not None and entry.is_dir() == source.is_dir()
        if not expected:
            raise InputError(f"--out {root}: contains something else ({path}); choose a new or empty folder")


def link_or_copy(root: Path, sources: dict[str, Path], copy: bool) -> None:
    """Link or copy all `sources` that are not there yet.

    A copy has the suffix .part until it is complete, so that an interrupted call can be repeated.
    """
    for path, source in sources.items():
        target = root / path
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
