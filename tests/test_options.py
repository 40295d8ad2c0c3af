"""The registry of options: each with its default and the test that sets it.

`options.toml` lists every option of every public function, class, sampler, command and settings'
file. One that is missing, has another default or names no test is an error here;
``python -m tools.mutants --options`` ignores them one at a time, and each test must notice.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

import score_kernels as sk
from score_kernels.cli import config
from score_kernels.cli.main import _parser
from score_kernels.sampling import Options, Request, stream

FOLDER = Path(__file__).parent
REGISTRY: dict[str, dict[str, list[str]]] = config.tomllib.loads(
    (FOLDER / "options.toml").read_text()
)
# Whose arguments tests give by their place.
POSITIONAL = {f"score_kernels.{name}" for name in ("VE", "VP", "SubVP")}
POSITIONAL |= {f"score_kernels.DDPMSchedule.{name}" for name in ("linear", "cosine")}
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def of(function: Any) -> dict[str, str]:
    """The parameters that have a default, or are given by name, with their defaults as text."""
    return {
        name: "" if parameter.default is parameter.empty else repr(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in VARIADIC
        and (parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY)
    }


def options() -> dict[str, dict[str, str]]:
    """All options of the library as it is: the defaults by name of the function and option."""
    found: dict[str, dict[str, str]] = {}
    for module in (sk, sk.fused, sk.ops, sk.networks):
        for name in module.__all__:
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            # The members of an enumeration are no options.
            if not callable(value) or value is sk.Purpose:
                continue
            found[path] = of(value)
            methods = (
                vars(value)
                if isinstance(value, type) and issubclass(value, (sk.Trainer, sk.DDPMSchedule))
                else ()
            )
            for method in methods:
                if not method.startswith("_") and callable(getattr(value, method)):
                    found[f"{path}.{method}"] = of(getattr(value, method))
    found["score_kernels.sampling.Options"] = dict.fromkeys(Options.__annotations__, "")
    found["score_kernels.sampling.stream"] = of(stream)
    found["score_kernels.sampling.Request"] = of(Request)
    for section, table in vars(config.Config()).items():
        keys = dataclasses.asdict(table)
        found[f"settings.{section}"] = {key: repr(default) for key, default in keys.items()}
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        flags = {a.dest: a.default for a in command._actions if a.option_strings}
        flags.pop("help")
        found[f"command.{name}"] = {
            flag: repr(str(value) if isinstance(value, Path) else value)
            for flag, value in flags.items()
        }
    return {path: table for path, table in found.items() if table}


def test_every_option_is_in_the_registry() -> None:
    listed = {path: {option: row[0] for option, row in t.items()} for path, t in REGISTRY.items()}
    there = options()
    changes = {
        path: (listed.get(path, {}), there.get(path, {}))
        for path in {*listed, *there}
        if listed.get(path) != there.get(path)
    }
    assert not changes, f"tests/options.toml lists, and the library has: {changes}"
    print(f"{sum(map(len, listed.values()))} options of {len(listed)} functions")


@pytest.mark.parametrize("path", REGISTRY)
def test_every_option_has_its_test(path: str) -> None:
    for option, (_, test) in REGISTRY[path].items():
        file, _, name = test.partition("::")
        text = (FOLDER / f"{file}.py").read_text()
        tests = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        assert name in tests, f"{path} {option}: there is no tests/{file}.py::{name}"
        # That the test fails without it is what tools.mutants --options finds.
        set_there = option in text.replace("-", "_") or path in POSITIONAL
        assert set_there, f"{path} {option}: tests/{file}.py never sets it"


def test_changes_called_equivalent_are_of_lines_that_stand() -> None:
    settings = config.tomllib.loads((FOLDER.parent / "tools/mutants.toml").read_text())
    for module, changes in settings["equivalent"].items():
        lines = {line.strip() for line in (FOLDER.parent / module).read_text().splitlines()}
        for change in changes:
            before = {part for part in lines if part and change.startswith(f"{part} -> ")}
            assert before, f"tools/mutants.toml, {module}: {change}"
