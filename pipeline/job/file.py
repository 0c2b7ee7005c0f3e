"""Reads a job from its file, the environment and the command line. The later of the three wins.

Every value keeps the place where it was written, so that an error message can name it.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from ...engine.env import JOB_PREFIX, job_variables
from ...engine.errors import ConfigError, quote
from .config import JobConfig
from .yaml_text import read_yaml

REQUIRED = tuple(name for name, field in JobConfig.model_fields.items() if field.is_required())
Places = dict[str, str]
"""Dotted path of a field -> the place where it is written, for people."""


def load_job(path: str | Path | None, *, settings: Iterable[str] = (), **overrides: Any) -> JobConfig:
    """Reads a job from a file, the environment and the arguments, and checks it.

    Args:
        path: A YAML file with the fields of `JobConfig`; None for no file. Relative paths in the file start at the
            folder of the file, all other relative paths at the current folder.
        settings: Fields as on the command line: ``"batch_size=32"``, ``"engine.max_num_seqs=64"``.
        **overrides: Fields that replace the fields of the file and of the environment, unless they are None.

    Returns:
        The checked job.

    Raises:
        ConfigError: The file is missing or is not YAML, or a field is wrong. The message names the place.
    """
    later, later_places = _later_values(settings, overrides)
    if path is None:
        _check_required(later)
        return _checked(later, later_places)
    file = Path(path)
    values, places = read_job_file(file)
    placeholders = {name: str(later[name]) for name in REQUIRED if name in later}
    job = _checked({**values, **placeholders}, places, str(file)).relative_to(file.parent)
    joined = _joined(job.model_dump(exclude_unset=True), later)
    return _checked(joined, {**places, **later_places}, str(file))


def read_job_file(file: Path) -> tuple[dict[str, Any], Places]:
    """Reads the fields of a job file, unchecked.

    Args:
        file: The file.

    Returns:
        The fields, and the line of each.

    Raises:
        ConfigError: The file is missing or is not YAML.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"job file {str(file)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"job file {str(file)!r} is not UTF-8 text: {error}") from error
    values, lines = read_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a job file holds fields such as model, input and output; got {values!r:.80}")
    places = {path: f"{file}:{line}" for path, line in lines.items()}
    return _with_prices(values, file.parent, places.get("prices", str(file))), places


def read_setting(setting: str) -> tuple[str, str]:
    """Splits ``"field.sub=value"`` into path and value.

    Raises:
        ConfigError: The text does not have this form.
    """
    path, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.[\w-]+)*", path.strip()):
        raise ConfigError(f"--set {setting!r} is not of the form field=value or field.sub=value")
    return path.strip(), text


def _later_values(settings: Iterable[str], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Places]:
    """Returns the job fields that the environment and the command line set, and the place where each was written.

    Later sources win over earlier ones: the environment variables ``MILLRACE_JOB_*``, `overrides`, then `settings`.

    Args:
        settings: Texts ``"field.sub=value"`` of the options ``--set``.
        overrides: Field -> value of an option of its own, such as ``--output``; None if the option was not given.
    """
    values: dict[str, Any] = {}
    places: Places = {}
    for name, text in job_variables().items():
        path = name.removeprefix(JOB_PREFIX).lower().replace("__", ".")
        _put(values, places, path, _parsed(path, text, name), name)
    for name, value in overrides.items():
        if value is not None:
            _put(values, places, name, value, f"--{name.replace('_', '-')}")
    for setting in settings:
        path, text = read_setting(setting)
        _put(values, places, path, _parsed(path, text, f"--set {path}"), f"--set {path}")
    return _with_prices(values, Path(), places.get("prices", "prices")), places


def _parsed(path: str, text: str, place: str) -> Any:
    """Returns the value of a text: the text itself for a text field (unless it is an allowed list), else its YAML."""
    field = JobConfig.model_fields.get(path)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    if str in kinds and not (list[str] in kinds and text.startswith("[")):
        return text
    return read_yaml(text, place, is_file=False)[0]


def _put(values: dict[str, Any], places: Places, path: str, value: Any, place: str) -> None:
    """Sets the value at a dotted path, such as ``engine.seed``, and records the place where it was written."""
    *parents, name = path.split(".")
    inside = values
    for parent in parents:
        inside = inside.setdefault(parent, {})
        if not isinstance(inside, dict):
            raise ConfigError(f"{place}: {path!r} lies inside {parent!r}, which is {inside!r:.60} and holds no fields")
    inside[name] = value
    places[path] = place


def _joined(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields in which later values replace earlier ones; a field that holds fields is joined field by field."""
    joined = copy.copy(dict(values))
    for name, value in later.items():
        inside = joined.get(name)
        joined[name] = _joined(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return joined


def _with_prices(values: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Returns the fields with the price table in place of the name of its file, if the job names one."""
    named = values.get("prices")
    if not isinstance(named, str):
        return values
    file = folder / os.path.expanduser(named)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: the table {quote(named)} of prices cannot be read: {error!s:.200}") from error
    table, _ = read_yaml(text, str(file))
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {quote(named)} must hold a table such as per_replica_hour: 2.5; got {table!r:.60}")
    return {**values, "prices": table}


def _check_required(values: Mapping[str, Any]) -> None:
    for name in REQUIRED:
        if name not in values:
            flags = ", ".join(f"--{one}" for one in REQUIRED)
            raise ConfigError(f"pass a job file, or --{name} (and {flags}, --prompt)")


def _checked(values: Mapping[str, Any], places: Places, file: str = "") -> JobConfig:
    try:
        return JobConfig(**values)
    except ConfigError as error:
        problems = [_with_place(places, file, line) for line in str(error).splitlines()]
        raise ConfigError("\n".join(problems)) from None


def _with_place(places: Places, file: str, problem: str) -> str:
    """Returns an error message with, at its start, the place of the field that the message is about."""
    path = find_field(problem, places)
    place = file if path is None else places[path]
    return f"{place}: {problem}" if place else problem


def find_field(problem: str, paths: Iterable[str]) -> str | None:
    """Finds the field that a message is about.

    Args:
        problem: The message. It has the path of the field (``JobConfig.messages.0.content``), or quotes or mentions
            its name, perhaps after the names of the fields around it.
        paths: Dotted paths of the fields that are written.

    Returns:
        The path of the innermost written field that the message is about; None if it is about none.
    """
    known = list(paths)
    words, quoted = re.findall(r"\w+", problem), re.findall(r"'(\w+)'", problem)

    def rank(path: str) -> tuple[bool, int, int, int]:
        """Returns a sort key: quoted names first, then few unmentioned outer names, deep paths, early mentions."""
        *around, name = path.split(".")
        unmentioned = sum(not part.isdigit() and part not in words for part in around)
        return name not in quoted, unmentioned, -len(around), words.index(name)

    asked = _path_in(problem)
    outer = next((path for path in _outwards(asked) if path in known), None)
    if outer != asked:  # The field is not written, so the message says that it is missing in the outer field.
        return outer
    inside = [path for path in known if outer is None or path.startswith(f"{outer}.")]
    return min((path for path in inside if path.split(".")[-1] in words), key=rank, default=outer)


def _path_in(problem: str) -> str | None:
    """Returns the path at the start of a message: ``a.b`` for ``JobConfig.a.b``."""
    begin = re.match(r"\w+\.(\w+(?:\.\w+)*)", problem)
    return None if begin is None else begin[1]


def _outwards(path: str | None) -> Iterator[str]:
    """Yields a dotted path and the paths of the fields around it, the innermost first: ``a.b``, then ``a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]
