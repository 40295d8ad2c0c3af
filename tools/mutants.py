"""Change the library's code in small ways, one at a time, and see whether its tests notice.

    python -m tools.mutants                                # all modules of mutants.toml
    python -m tools.mutants score_kernels/sampling/sde.py  # some
    python -m tools.mutants --options                      # ignore every option of options.toml
    python -m tools.mutants --options score_kernels.ddim   # those of some functions

The changes are cosmic-ray's: a number, an operator, a comparison, a condition. Each runs the
module's tests in a fork of a process that has imported torch already. The module is changed in
memory only; the files stay as they are. Tests that start processes see the unchanged module.

Prints the changes that no test noticed, and of each module how many were noticed; the exit status
is 1 where any was not. Changes that alter nothing a user could see are listed in mutants.toml,
under the module, as they are printed, with the reason: `"before -> after" = "why"`. They are not
run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import inspect
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from tqdm import tqdm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())
OPTIONS = tomllib.loads((ROOT / "tests" / "options.toml").read_text())
# One change of each kind at a place: the opposite operator, the other side of a boundary.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Pow_Mul|FloorDiv_Div|Mod_FloorDiv"
    r"|LShift_RShift|RShift_LShift)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt)"
    r"|NumberReplacer|ReplaceUnaryOperator_(Delete_USub|Delete_Not)|AddNot|Replace(And|Or)With.*"
    r"|Replace(True|False)With.*|Replace(Break|Continue)With.*|ZeroIterationForLoop)"
)
PREPARED = (
    "_hypothesis_pytestplugin", "anyio.pytest_plugin", "hypothesis", "pytest", "scipy.integrate",
    "scipy.stats", "torch._dynamo.testing", "torch._inductor.config", "torch.profiler",
    "xdist.plugin",
)  # fmt: skip
# Of one test: what takes longer is an endless loop.
SECONDS = 25
# In the place of a change: the module's tests must pass.
UNCHANGED = "unchanged"
# How many of the tests that have noticed changes run first.
MOST = 12
# An exit status that pytest does not have.
NOT_APPLIED = 99


@dataclass
class Mutant:
    """A changed module: its path, its code, and the changed line before and after."""

    module: str
    code: str
    change: str
    line: int

    @property
    def tests(self) -> list[str]:
        return [f"tests/{name}.py" for name in SETTINGS["tests"][self.module]]

    def apply(self) -> None:
        """Let the module be imported as it is here, and not from its file or a compiled one."""
        path, loader = str(ROOT / self.module), importlib.machinery.SourceFileLoader
        read, code = loader.get_data, self.code.encode()
        cached = importlib.util.cache_from_source(path)

        def changed(loader: Any, name: str) -> bytes:
            if name == cached:
                raise OSError("compiled from the unchanged module")
            return code if name == path else read(loader, name)

        loader.get_data = changed  # type: ignore[method-assign]
        loader.set_data = lambda *_, **__: None  # type: ignore[method-assign]


@dataclass
class Ignored:
    """An option of a function, command or settings' section that is ignored."""

    module: str
    change: str
    test: str
    line: int = 0

    @property
    def tests(self) -> list[str]:
        file, name = self.test.split("::")
        return [f"tests/{file}.py::{name}"]

    def apply(self) -> None:
        """Let the option have its default whatever is given."""
        head, _, name = self.module.partition(".")
        {"settings": _without_setting, "command": _without_flag}.get(head, _without_argument)(
            self.module if head == "score_kernels" else name, self.change
        )


def _without_setting(section: str, key: str) -> None:
    from score_kernels.cli import config

    read, default = config.from_dict, getattr(getattr(config.Config(), section), key)

    def changed(*arguments: Any) -> Any:
        settings = read(*arguments)
        table = config.replace(getattr(settings, section), **{key: default})
        return config.replace(settings, **{section: table})

    config.from_dict = changed


def _without_flag(command: str, flag: str) -> None:
    from score_kernels.cli import main

    make = main._parser

    def changed() -> argparse.ArgumentParser:
        parser = make()
        parse = parser.parse_args

        def parsed(*arguments: Any) -> argparse.Namespace:
            found = parse(*arguments)
            if found.command == command:
                (choices,) = (a.choices for a in parser._actions if a.dest == "command")
                setattr(found, flag, choices[command].get_default(flag))
            return found

        parser.parse_args = parsed  # type: ignore[method-assign, assignment]
        return parser

    main._parser = changed


def _without_argument(path: str, option: str) -> None:
    """In every module of the library that has imported the function."""
    import score_kernels.cli.main
    import score_kernels.cli.train  # noqa: F401

    *owners, name = path.split(".")[1:]
    owner: Any = functools.reduce(getattr, owners, score_kernels)
    if name == "Options":
        # Samplers hand them on in one dictionary.
        owner, name = owner.engine, "run"
    value = getattr(owner, name)
    if inspect.isclass(value):
        owner, name = value, "__new__" if "__new__" in vars(value) else "__init__"
    # A method with its decorator, which makes it anew.
    held = inspect.getattr_static(owner, name)
    function = getattr(held, "__func__", held)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def changed(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        for given in (bound.arguments, bound.arguments.get("options", {})):
            parameter = signature.parameters.get(option)
            if option in given and parameter and parameter.default is parameter.empty:
                given[option] = _other(given[option])
            else:
                given.pop(option, None)
        return function(*bound.args, **bound.kwargs)

    if inspect.isclass(owner):
        setattr(owner, name, changed if held is function else type(held)(changed))
        return
    for module in [m for n, m in sys.modules.items() if n.startswith("score_kernels")]:
        for own, held in list(vars(module).items()):
            if held is function:
                setattr(module, own, changed)


def _other(value: Any) -> Any:
    """Something else, for an option that has no default."""
    return value + 1 if isinstance(value, int) else 2 * value if isinstance(value, float) else None


def mutants(module: str) -> Iterator[Mutant]:
    """All changes of a module."""
    source = (ROOT / module).read_text()
    lines = source.splitlines()
    for name in filter(OPERATORS.fullmatch, operator_names()):
        # Of a number cosmic-ray makes one more and one less: the first is enough.
        step, at = 2 if name == "core/NumberReplacer" else 1, 0
        while (code := mutate_code(source, get_operator(name)(), at)) is not None:
            at += step
            pairs = enumerate(zip(lines, code.splitlines(), strict=True), 1)
            number, (before, after) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
            change = f"{before.strip()} -> {after.strip()}"
            if not any(re.search(pattern, change) for pattern in SETTINGS["ignored"]):
                yield Mutant(module, code, change, number)


class Alarm:
    """A plugin of pytest that ends the process where a test does not end."""

    def pytest_runtest_logstart(self) -> None:
        signal.alarm(SECONDS)


def run(mutant: Mutant | Ignored, folder: str, first: list[str]) -> None:
    """In a fork: import the library with the change, and run the tests, those of `first` before all
    others; does not return."""
    os.setpgrp()
    signal.alarm(SECONDS)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        mutant.apply()
    except Exception:
        os._exit(NOT_APPLIED)
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", folder]
    chosen = " and ".join(f"not {name}" for name in SETTINGS["slow"])
    if first and pytest.main([*options, *first], [Alarm()]) == pytest.ExitCode.TESTS_FAILED:
        os._exit(1)
    # A file at a time: most changes are noticed by the first, and the others take long to collect.
    for tests in mutant.tests:
        code = pytest.main([*options, "-k", chosen, tests], [Alarm()])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            os._exit(int(code))
    os._exit(0)


def start(mutant: Mutant | Ignored, folder: str, first: Sequence[str] = ()) -> tuple[int, Path]:
    """The process of a changed module's tests, and its log."""
    folder = tempfile.mkdtemp(dir=folder)
    process = os.fork()
    if not process:
        try:
            run(mutant, folder, list(first))
        finally:
            os._exit(1)
    return process, Path(f"{folder}.log")


def finished() -> tuple[int, bool]:
    """Wait for a process; whether its tests passed."""
    process, status = os.wait()
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    code = os.waitstatus_to_exitcode(status)
    if code == NOT_APPLIED:
        raise RuntimeError("a change could not be made")
    return process, code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "modules", nargs="*", help="of mutants.toml, or functions of options.toml; default: all"
    )
    parser.add_argument("--options", action="store_true", help="ignore options instead")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="at a time; default: one a core"
    )
    arguments = parser.parse_args()
    known = OPTIONS if arguments.options else SETTINGS["tests"]
    for name in arguments.modules:
        if name not in known:
            parser.error(f"got {name!r}, expected some of: {', '.join(known)}")
    arguments.modules = arguments.modules or list(known)
    os.chdir(ROOT)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        return all_of(arguments, folder)


def all_of(arguments: argparse.Namespace, folder: str) -> int:
    """Run the tests of every change, and print what was not noticed; 0 if nothing was not."""
    # What the tests import, once for all forks; the library itself is imported by each.
    for name in PREPARED:
        importlib.import_module(name)

    started, equivalent = time.perf_counter(), SETTINGS.get("equivalent", {})
    waiting: list[Any] = []
    if not arguments.options:
        for module in arguments.modules:
            waiting += [Mutant(module, (ROOT / module).read_text(), UNCHANGED, 0), *mutants(module)]
    else:
        rows = [(p, o, test) for p in arguments.modules for o, (_, test) in OPTIONS[p].items()]
        waiting = [Ignored(*row) for row in rows]
    total = {mutant.module: 0 for mutant in waiting}
    spared = dict(total)
    for mutant in list(waiting):
        if mutant.change in equivalent.get(mutant.module, {}):
            spared[mutant.module] += 1
            waiting.remove(mutant)
    survived: list[Any] = []
    running: dict[int, Any] = {}
    # The tests that have noticed changes of a module, the last one first: they may notice the next.
    noticing: dict[str, list[str]] = {module: [] for module in total}
    bar = tqdm(total=len(waiting), unit="mutant")
    # Ctrl-C ends with the table of what was run.
    with bar, contextlib.suppress(KeyboardInterrupt):
        while waiting or running:
            while waiting and len(running) < arguments.processes:
                mutant = waiting.pop(0)
                first = [] if arguments.options else noticing[mutant.module][:MOST]
                process, log = start(mutant, folder, first)
                running[process] = mutant, log
            process, passed = finished()
            mutant, log = running.pop(process)
            tests = noticing[mutant.module]
            for test in re.findall(r"^FAILED (tests/\S+)", log.read_text(), re.MULTILINE)[:1]:
                tests[:] = [test, *(other for other in tests if other != test)]
            if mutant.change == UNCHANGED and not passed:
                print(log.read_text()[-3000:])
                raise RuntimeError(f"the tests of {mutant.module} fail without a change")
            total[mutant.module] += mutant.change != UNCHANGED
            if passed and mutant.change != UNCHANGED:
                survived.append(mutant)
                bar.write(f"{mutant.module}:{mutant.line}: {mutant.change}")
            bar.update()
    print(f"\n| module | changes | noticed | share | equivalent |\n|{'---|' * 5}")
    for module, count in total.items():
        noticed = count - sum(m.module == module for m in survived)
        share = noticed / max(count, 1)
        print(f"| {module} | {count} | {noticed} | {share:.1%} | {spared[module]} |")
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{sum(total.values())} changes in {minutes:.1f} minutes, {len(survived)} not noticed")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
