"""Output folders that consist of links to, or copies of, existing files and folders.

`sources` is {path below the output folder: existing file or folder}.
"""

import errno
import shutil
from pathlib import Path

from clever.utils import InputError

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # exFAT, some network file systems
NOT_ALLOWED_ON_WINDOWS = 1314


def check_output(root: Path, sources: dict[str, Path], copy: bool) -> None:
    """Raise InputError unless `root` contains nothing but what link_or_copy puts there; missing files are fine.

    Where links were asked for, copies are fine, too: the file system may have no links.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"--out {root}: is not a folder")
    folders = {parent.as_posix() for path in sources for parent in Path(path).parents}
    to_check = sorted(root.glob("*"))
    while to_check:
        entry = to_check.pop(0)
        path = entry.relative_to(root).as_posix()
        source = sources.get(path if entry.is_symlink() else path.removesuffix(".part"))
        if entry.is_symlink():
            expected = not copy and source is not None and entry.resolve() == source
        elif path in folders:
            expected = entry.is_dir()
            to_check += sorted(entry.glob("*"))
        else:
            expected = source is not None and _may_be_copy(entry, source)
        if not expected:
            raise InputError(f"--out {root}: contains something else ({path}); choose a new or empty folder")


def _may_be_copy(entry: Path, source: Path) -> bool:
    """Whether a file or folder has nothing that its source lacks; it may be incomplete."""
    if not entry.is_dir() or not source.is_dir():
        return entry.is_dir() == source.is_dir()
    return {path.name for path in entry.iterdir()} <= {path.name for path in source.iterdir()}


def link_or_copy(root: Path, sources: dict[str, Path], copy: bool) -> None:
    """Link or copy all `sources` that are not there yet; they are copied, too, where the file system has no symbolic links.

    A copy has the suffix .part until it is complete, so that an interrupted call can be repeated.
    """
    for path, source in sources.items():
        target = root / path
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not copy:
            try:
                target.symlink_to(source, target_is_directory=source.is_dir())
                continue
            except OSError as error:
                if error.errno not in NO_LINKS and getattr(error, "winerror", None) != NOT_ALLOWED_ON_WINDOWS:
                    raise
                print(f"{root}: no symbolic links here ({error.strerror}); the files are copied")
                copy = True
        part = target.with_name(f"{target.name}.part")
        if source.is_dir():
            shutil.copytree(source, part, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, part)
        part.rename(target)
