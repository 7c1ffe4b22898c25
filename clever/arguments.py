"""Command lines: the parser of all scripts, --config, and types and checks of flags."""

import argparse
import importlib.util
import json
import math
import os
import reprlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NoReturn

import yaml

from clever.utils import InputError, describe_error
from clever.version import __version__

OF_THE_LAUNCHER = ("local_rank", "dist_url")  # flags that a configuration does not set
OF_ONE_CALL = ("help", "version", "config", "debug")  # flags that it cannot set
PIP_NAMES = {"sklearn": "scikit-learn", "umap": "umap-learn", "mlflow": "mlflow-skinny"}  # where they are not the module's

# --- parser ------------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, "", argparse.SUPPRESS) or action.const is True or "default" in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else "%(default)s"
        return f"{text} (default: {default})".strip()


class ArgumentParser(argparse.ArgumentParser):
    """A parser with --config, a file that gives values to flags; those of the command line win.

    Raises InputError instead of printing the usage: one line, of one process, as for any other invalid input.
    """

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})
        self.config_path: str | None = None
        self.add_argument("--config", metavar="FILE", help="YAML file with values of flags (flag: value), or the JSON file of "
            "a result, whose flags are used again; flags of the command line win")  # fmt: skip
        self.add_argument("--version", action="version", version=f"clever {__version__}")
        self.add_argument("--debug", action="store_true", help="show the traceback of any error, as CLEVER_TRACEBACK=1 does")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        path = self.config_path = finder.parse_known_args(words)[0].config
        parsed = super().parse_args(words if path is None else [*config_words(self, path), *words], namespace)
        if parsed.debug:
            os.environ["CLEVER_TRACEBACK"] = "1"
        del parsed.config, parsed.debug  # its values are those of the flags now
        return parsed

    def error(self, message: str) -> NoReturn:
        source = f"; flags are also read from {self.config_path}" if self.config_path else ""
        raise InputError(f"{message} (--help lists all arguments{source})")


# --- configurations ----------------------------------------------------------------------------------------------------


def config_words(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The flags in a file as words of a command line, so that they are parsed and checked as if they had been typed.

    The file is a YAML mapping {flag: value}. The value of a flag with several values is a list; null and the empty list leave a
    flag at its default. In a result file (JSON), the flags are those of its `args`. Raises InputError for a file that cannot be
    read, that is not a mapping, or that names a flag that the parser does not have.
    """
    flags = {action.dest: action for action in parser._actions if action.option_strings and action.dest not in OF_ONE_CALL}
    words = []
    for name, value in read_config(path).items():
        if name not in flags:
            raise InputError(f"--config {path}: {str(name)!r} is not a flag of {parser.prog}; --help lists them")
        if value is None or value == [] or name in OF_THE_LAUNCHER:
            continue
        if flags[name].nargs == 0:  # a switch, such as --evaluate
            words += [f"--{name}"] if value else []
        elif isinstance(value, list) and flags[name].nargs is not None:
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return [*words, f"--config={path}"]  # ends a list of values before the words of the command line


def read_config(path: str) -> dict[str, Any]:
    """The flags and values in a YAML file or in the JSON file of a result. Raises InputError unless it holds a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--config {path}: cannot be read ({describe_error(error)})") from error
    if isinstance(values, dict) and "kind" in values and isinstance(values.get("args"), dict):
        values = values["args"]
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: must be a mapping, lines such as `epochs: 100`, not {reprlib.repr(values)}")
    return values if path.endswith(".json") else {name: _expanded(value, path) for name, value in values.items()}


def _expanded(value: Any, path: str) -> Any:
    """A value of YAML with ~ and $VAR as in a shell; $$ is a $. Raises InputError for a variable that is not set."""
    if isinstance(value, list):
        return [_expanded(item, path) for item in value]
    try:
        return Template(os.path.expanduser(value)).substitute(os.environ) if isinstance(value, str) else value
    except (KeyError, ValueError) as error:
        raise InputError(f"--config {path}: {value}: needs a variable that is set; a $ itself is written $$") from error


def config_text(args: argparse.Namespace) -> str:
    """All flags with their values as YAML, for --config. A flag without a value is left out."""
    values = {name: value for name, value in plain_args(args).items() if value is not None and name not in OF_THE_LAUNCHER}
    return yaml.safe_dump(values, sort_keys=False).replace("$", "$$")


# --- types and checks of flags -----------------------------------------------------------------------------------------


def bool_flag(text: str) -> bool:
    """Parse true/false/on/off/1/0 for argparse."""
    values = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false, on, off, 1, 0")
    return values[text.lower()]


class TypedFloat(float):
    """A float that prints as it was typed: file names contain lr and hp1 as the launch scripts spell them."""

    def __new__(cls, text: str):
        try:
            number = super().__new__(cls, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is finite and greater than 0."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be greater than 0, and finite")


def check_not_negative(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is at least 0 and below 2**63, which torch's seeds must not reach."""
    for name in names:
        if not 0 <= getattr(args, name) < 2**63:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 or greater, and less than 2**63")


def check_choices(flag: str, values: Sequence[str], choices: Iterable[str]) -> None:
    """Raise InputError if one of the values of a flag is unknown or given twice."""
    for i, value in enumerate(values):
        if value not in choices:
            raise InputError(f"--{flag} {value!r}: must be one of {', '.join(choices)}")
        if value in values[:i]:
            raise InputError(f"--{flag} {value!r}: given twice")


def check_installed(value: str, modules: Iterable[str]) -> None:
    """Raise InputError unless the modules that a flag's value needs are installed; `value` is, for example, "--plot umap"."""
    missing = [PIP_NAMES.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"{value}: {', '.join(missing)} not installed: pip install {' '.join(missing)}")


def plain_args(args: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """Arguments as a dict of plain values, as checkpoints and JSON files store them; the originals store a Namespace."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: float(value) if isinstance(value, TypedFloat) else value for name, value in values.items()}


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Raise InputError, which names the flag, unless `folder` or its nearest existing parent is writable; leaves no file."""
    if not str(folder):
        raise InputError(f"{flag}: is empty; is a variable not set?")
    if str(folder).startswith("~"):
        raise InputError(f"{flag} {folder}: the shell has not expanded the ~; write $HOME")
    path = Path(folder).absolute()
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{flag} {folder}: is a file, not a folder")
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):  # permission bits say nothing about root and read-only file systems
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: {path} cannot be written ({error.strerror})") from error


def check_outputs(args: argparse.Namespace, paths: Iterable[Path]) -> None:
    """Raise InputError if one of the files that belong to --out is a folder, or exists without --overwrite."""
    for path in paths:
        if path.is_dir() or (path.exists() and not args.overwrite):
            raise InputError(f"--out {args.out}: {path} exists; --overwrite replaces it if it is a file")
