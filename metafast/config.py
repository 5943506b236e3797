"""Options of the command line from a TOML file."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """An option or a file that a command cannot work with; the message says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` if one of ``known`` is like ``name``, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def option_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The long options of a parser, without their dashes; those that switch one off left out."""
    return {
        option[2:]: action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
        and not (isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-"))
    }


def read_config(path: Path, command: str, parsers: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The options that a TOML file gives to a command, as arguments of the command line.

    Keys are the options without their dashes. Those at the top are for any command, and have to be options of
    the one that runs; those in a table ``[train]``, ``[evaluate]`` ... are for that command alone, and win.

    Raises:
        UsageError: no such file, no TOML, an unknown key, a value of the wrong type.
    """
    values = {}
    tables = {}
    for key, value in _load(path).items():
        if not isinstance(value, dict):
            values[key] = value
        elif key in parsers:
            tables[key] = value
        else:
            known = ", ".join(f"[{name}]" for name in parsers)
            raise UsageError(f"{path}: there is no command for the table [{key}]; expected {known}")
    for other, table in tables.items():
        for key in table:
            _known(path, key, other, parsers, f" in [{other}]")
    arguments = []
    for key, value in (values | tables.get(command, {})).items():
        name, action = _known(path, key, command, parsers, "")
        arguments += _arguments(path, name, value, action)
    return arguments


def _load(path: Path) -> dict[str, Any]:
    module = next((name for name in ("tomllib", "tomli") if importlib.util.find_spec(name)), None)
    if module is None:
        raise UsageError("--config needs Python 3.11 or later, or the package tomli (pip install tomli)")
    toml = importlib.import_module(module)
    try:
        document: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"--config: {path} is no TOML: {error}") from error
    return document


def _known(
    path: Path, key: str, command: str, parsers: Mapping[str, argparse.ArgumentParser], where: str
) -> tuple[str, argparse.Action]:
    """The option that a key means."""
    name = key.replace("_", "-")
    options = option_names(parsers[command])
    if name in options and name not in ("config", "help"):
        return name, options[name]
    owners = [other for other, parser in parsers.items() if name in option_names(parser)]
    if name in ("config", "help"):
        hint = ", which is for the command line"
    elif owners:
        hint = f"; it is one of metafast {owners[0]}, so put it into a table [{owners[0]}]"
    else:
        hint = nearest(name, options)
    raise UsageError(f"{path}: metafast {command} has no option {key!r}{where}{hint}")


def _arguments(path: Path, name: str, value: Any, action: argparse.Action) -> list[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {name}: expected true or false, got {value!r}")
        return [f"--{name}" if value else f"--no-{name}"]
    entries = value if isinstance(value, list) and action.nargs == "+" else [value]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (int, float, str)):
            wanted = "a number or text" + (", or a list of them" if action.nargs == "+" else "")
            raise UsageError(f"{path}: {name}: expected {wanted}, got {value!r}")
    if not entries:
        raise UsageError(f"{path}: {name}: expected at least one entry, got []")
    if len(entries) == 1:
        return [f"--{name}={entries[0]}"]
    return [f"--{name}", *map(str, entries)]
