"""Where settings stand: flags, environment and a YAML file, each value with the place it was found in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError

PREFIX = "TRIMTAB_SERVE_"
API_KEY = "TRIMTAB_API_KEY"


@dataclass(frozen=True, slots=True)
class Given:
    """A value, the place for messages, and its rank: a higher one wins."""

    value: Any
    place: str
    rank: int


def from_flags(flags: Mapping[str, Any]) -> dict[str, Given]:
    """The flags that were given (not None, not an empty list)."""
    return {
        name: Given(value, "on the command line", 2)
        for name, value in flags.items()
        if value is not None and value != []
    }


def from_environment(environ: Mapping[str, str], lists: Collection[str]) -> dict[str, Given]:
    """`TRIMTAB_SERVE_PORT=80` as the setting `port`; `TRIMTAB_API_KEY` is read too.

    Settings named in `lists` hold several values between semicolons.
    """
    found: dict[str, Given] = {}
    for variable in (API_KEY, *sorted(environ)):
        name = "api_key" if variable == API_KEY else variable.removeprefix(PREFIX).lower()
        text = environ.get(variable, "")
        if (variable != API_KEY and not variable.startswith(PREFIX)) or name == "config" or not text:
            continue
        value = [part.strip() for part in text.split(";") if part.strip()] if name in lists else text
        found[name] = Given(value, f"in the environment variable {variable}", 1)
    return found


def from_file(path: str) -> dict[str, Given]:
    """The settings of a YAML file. A model folder or plan file named in it is sought beside it first.

    Raises ConfigError naming the file, and the line where there is one.
    """
    import yaml

    file = Path(path)
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the settings {path!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the settings {path!r} are not a text in UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {problem or error}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: expected settings such as 'port: 8000', one a line")
    found: dict[str, Given] = {}
    loader = yaml.SafeLoader("")
    for key, value in node.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        try:
            name, plain = str(loader.construct_object(key)), loader.construct_object(value, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from None
        if name in found:
            raise ConfigError(f"{place}: the setting {name!r} is given twice")
        found[name] = Given(_beside(file, name, plain), place, 0)
    return found


def _beside(file: Path, name: str, value: Any) -> Any:
    """A model folder or plan file that lies beside the settings, as a path that holds from here."""
    if name == "plans" and isinstance(value, list):
        return [_beside(file, name, item) for item in value]
    if not isinstance(value, str):
        return value
    near = file.parent / value
    if name == "model" and near.is_dir():
        return str(near)
    if name == "plans" and value.endswith((".yaml", ".yml")) and near.is_file():
        return str(near)
    return value
