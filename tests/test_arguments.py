"""Flags: the parser, configurations, types and checks."""

import argparse
import copy
import importlib
import json
import os
import re

import pytest

from clever import __version__, arguments
from clever.arguments import TypedFloat
from clever.utils import InputError

# --- flags -------------------------------------------------------------------------------------------------------------


def test_true_and_false_flags():
    assert [arguments.bool_flag(text) for text in ("true", "TRUE", "On", "1")] == [True] * 4
    assert [arguments.bool_flag(text) for text in ("false", "False", "OFF", "0")] == [False] * 4


@pytest.mark.parametrize("text", ["0.80", "1E-03", ".5"])
def test_typed_floats_print_as_typed(text):
    number = TypedFloat(text)
    assert number == float(text) and isinstance(number, float)
    assert str(number) == f"{number}" == f"{number!s}" == text
    assert type(number * 2) is float and copy.deepcopy(number) == number and str(copy.deepcopy(number)) == text


def test_plain_arguments():
    for args in ({"lr": TypedFloat("1e-3"), "n": 3}, argparse.Namespace(lr=TypedFloat("1e-3"), n=3)):
        values = arguments.plain_args(args)
        assert values == {"lr": 0.001, "n": 3} and type(values["lr"]) is float


def test_parser_reports_in_one_line():
    parser = arguments.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    with pytest.raises(InputError, match=r"^argument --size: invalid int value: 'x' \(--help lists all arguments\)$"):
        parser.parse_args(["--size", "x"])
    with pytest.raises(InputError, match="required: --size"):
        parser.parse_args([])


# --- configurations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parser():
    parser = arguments.ArgumentParser()
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--lr", type=TypedFloat, default=TypedFloat("0.5"))
    parser.add_argument("--reg_lambd", default="x")
    parser.add_argument("--scale", type=float, nargs="+", default=[0.4, 1.0])
    parser.add_argument("--check", type=arguments.bool_flag, default=True)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("folders", nargs="*")
    return parser


def test_a_configuration_gives_values_and_the_command_line_wins(parser, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 3\nlr: 5e-4\nreg_lambd: ''\nscale: [0.1, -2]\ncheck: false\nevaluate: true\nlocal_rank: 7\n")
    found = parser.parse_args(["--config", str(path), "results"])
    assert vars(found) == {
        "epochs": 3, "lr": 5e-4, "reg_lambd": "", "scale": [0.1, -2.0], "check": False, "evaluate": True, "local_rank": 0,
        "folders": ["results"],
    }  # fmt: skip
    assert str(found.lr) == "5e-4"
    found = parser.parse_args(["--scale", "3", f"--config={path}", "--epochs", "9"])
    assert (found.epochs, found.scale, found.check, found.folders) == (9, [3.0], False, [])
    path.write_text("epochs: 3\nevaluate: false\nlr: null\n")
    found = parser.parse_args(["--config", str(path)])
    assert (found.epochs, found.evaluate, found.lr) == (3, False, 0.5)


def test_the_flags_of_a_result_are_used_again(parser, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"kind": "linear_probe", "accuracy": 3, "args": {"epochs": 4, "scale": [1.0], "lr": 0.25}}))
    found = parser.parse_args(["--config", str(path)])
    assert (found.epochs, found.scale, found.lr) == (4, [1.0], 0.25)


def test_a_configuration_knows_the_home_folder_and_variables(parser, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data: #1")
    monkeypatch.delenv("ABSENT", raising=False)
    path = tmp_path / "run.yaml"

    def read(text):
        path.write_text(f"epochs: 1\nreg_lambd: {text}\n")
        return parser.parse_args(["--config", str(path)]).reg_lambd

    assert [read(text) for text in ("~/runs", "$DATA/a", "a/${DATA}", "a~", "$$5")] == [
        "/home/me/runs", "/data: #1/a", "a//data: #1", "a~", "$5",
    ]  # fmt: skip
    for text in ("$ABSENT/a", "costs$"):
        with pytest.raises(InputError, match=f"--config {path}: {re.escape(text)}: needs a variable that is set"):
            read(text)
    path.write_text(arguments.config_text(argparse.Namespace(epochs=1, reg_lambd="$DATA")))  # what main_dino.py writes
    assert parser.parse_args(["--config", str(path)]).reg_lambd == "$DATA"
    path = tmp_path / "result.json"  # a text in it is what it was
    path.write_text(json.dumps({"kind": "knn", "args": {"epochs": 1, "reg_lambd": "$DATA"}}))
    assert parser.parse_args(["--config", str(path)]).reg_lambd == "$DATA"


@pytest.mark.parametrize(
    "content, words",
    [
        ("epoch: 3", ["'epoch' is not a flag"]),
        ("- epochs", ["must be a mapping", "not ['epochs']"]),
        ("epochs: x", ["--epochs: invalid int value: 'x'", "flags are also read from", "run.yaml"]),
        ("!!python/object/apply:os.getcwd []", ["cannot be read"]),
    ],
)
def test_bad_configurations_are_one_line(parser, tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        parser.parse_args(["--config", str(path)])
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_debug_asks_for_tracebacks(parser, monkeypatch):
    monkeypatch.delenv("CLEVER_TRACEBACK", raising=False)
    assert "debug" not in vars(parser.parse_args(["--epochs", "1"])) and "CLEVER_TRACEBACK" not in os.environ
    parser.parse_args(["--epochs", "1", "--debug"])
    assert os.environ.pop("CLEVER_TRACEBACK") == "1"


@pytest.mark.parametrize("name", ["main_dino", "eval_linear", "eval_linear_ds", "eval_knn", "eval_equivariance"])
def test_every_flag_of_a_script_survives_a_configuration(name, tmp_path):
    parser = importlib.import_module(name).get_args_parser()
    required = [word for action in parser._actions if action.required for word in (action.option_strings[0], "x")]
    first = parser.parse_args(required)
    (tmp_path / "run.yaml").write_text(arguments.config_text(first))
    assert parser.parse_args(["--config", str(tmp_path / "run.yaml")]) == first


def test_version(parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"clever {__version__}\n"
