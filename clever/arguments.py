"""Command lines: the parser of all scripts, --config, and types and checks of flags."""

import argparse
import difflib
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from clever.utils import (
    InputError,
    describe_error,
    short_repr,
    write_text_atomically,
)

OF_THE_LAUNCHER = ("local_rank", "dist_url")  # flags that a configuration does not set
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
        super().__init__(description=description, **{"formatter_class": HelpFormatter, **options})
        self.config_path: str | None = None
        self.add_argument("--config", metavar="FILE", help="YAML file with values of flags (flag: value), or the JSON file of "
            "a result, whose flags are used again; flags of the command line win")  # fmt: skip

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        path = self.config_path = finder.parse_known_args(words)[0].config
        parsed = super().parse_args(words if path is None else [*config_words(self, path), *words], namespace)
        if parsed.config != path:
            self.error(f"--config {parsed.config}: write the name of this flag in full")
        del parsed.config  # its values are those of the flags now
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
    own = ("help", "config")
    flags = {action.dest: action for action in parser._actions if action.option_strings and action.dest not in own}
    words = []
    for name, value in read_config(path).items():
        if name not in flags:
            near = difflib.get_close_matches(str(name), flags, n=1, cutoff=0)[0]
            raise InputError(f"--config {path}: {str(name)!r} is not a flag of {parser.prog}; the nearest one is {near!r}")
        if value is None or value == [] or name in OF_THE_LAUNCHER:
            continue
        if flags[name].nargs == 0:  # a switch, such as --evaluate
            if not isinstance(value, bool):
                raise InputError(f"--config {path}: {name!r} must be true or false, not {short_repr(value)}")
            words += [f"--{name}"] if value else []
        elif isinstance(value, list) and flags[name].nargs is not None and not any(isinstance(v, list | dict) for v in value):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, list | dict):
            wanted = "a value" if flags[name].nargs is None else "a value or a list of values"
            raise InputError(f"--config {path}: {name!r} must have {wanted}, not {short_repr(value)}")
        else:
            words.append(f"--{name}={value}")
    return [*words, f"--config={path}"]  # ends a list of values before the words of the command line


def read_config(path: str) -> dict[str, Any]:
    """The flags and values in a YAML file or in the JSON file of a result. Raises InputError unless it holds a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        is_json = path.endswith(".json")
        values = json.loads(text, object_pairs_hook=_without_repetition) if is_json else yaml.load(text, _Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--config {path}: cannot be read ({describe_error(error)})") from error
    if isinstance(values, dict) and "kind" in values and isinstance(values.get("args"), dict):
        values = values["args"]
    if not isinstance(values, dict):
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise InputError(f"--config {path}: must be a mapping, lines such as `epochs: 100`, but holds {kind}")
    return values


def _without_repetition(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping. Raises ValueError if it has a key twice: one of the values would be lost."""
    pairs = list(pairs)
    keys = [key for key, _ in pairs]
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} is given twice")
    try:
        return dict(pairs)
    except TypeError as error:  # a key that is a list, for example
        raise ValueError(f"a key must be a text ({error})") from error


class _Loader(yaml.SafeLoader):
    """Without YAML 1.1's numbers that are not what they look like: 0123 is 83 there, and 1:30 is 90."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    given = [(loader.construct_object(key, deep=True), None) for key, _ in node.value if not key.tag.endswith(":merge")]
    _without_repetition(given)
    loader.flatten_mapping(node)  # `<<`: what it brings is overridden by what is given
    return {loader.construct_object(key, True): loader.construct_object(value, True) for key, value in node.value}


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
        raise ValueError(f"{node.value}: write a number without leading zeros and colons, or a text in quotes")
    kind = "float" if node.tag.endswith("float") else "int"
    return getattr(loader, f"construct_yaml_{kind}")(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def save_config(args: argparse.Namespace, path: str | Path) -> None:
    """Write all flags with their values as a YAML file for --config, atomically. A flag without a value is left out."""
    write_text_atomically(_config_text(args), path)


def is_saved_config(args: argparse.Namespace, path: Path) -> bool:
    """Whether a file is what save_config writes for these arguments."""
    return path.exists() and path.read_bytes() == _config_text(args).encode()


def _config_text(args: argparse.Namespace) -> str:
    values = {name: value for name, value in plain_args(args).items() if value is not None and name not in OF_THE_LAUNCHER}
    return yaml.safe_dump(values, sort_keys=False)


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
    specs = {module: importlib.util.find_spec(module) for module in modules}
    missing = [module for module, spec in specs.items() if spec is None or spec.origin is None]  # None: a folder of this name
    if missing:
        names = [PIP_NAMES.get(module, module) for module in missing]
        raise InputError(f"{value}: {', '.join(names)} not installed: pip install {' '.join(names)}")


def plain_args(args: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """Arguments as a dict of plain values, as checkpoints and JSON files store them; the originals store a Namespace."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: float(value) if isinstance(value, TypedFloat) else value for name, value in values.items()}


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Raise InputError, which names the flag, unless `folder` or its nearest existing parent is writable; leaves no file."""
    if not str(folder):
        raise InputError(f"{flag}: is empty; is a variable not set?")
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
        if path.is_dir():
            raise InputError(f"--out {args.out}: {path} is a folder")
        if path.exists() and not args.overwrite:
            raise InputError(f"--out {args.out}: {path} exists; --overwrite replaces it")
