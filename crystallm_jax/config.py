"""Typed configuration: a frozen dataclass from a YAML file and `key=value` overrides, checked key by key.

Parsing, merging and type checks are OmegaConf's; what is added here is one-line errors with the place and the mend.
"""

import dataclasses
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import (
    AliasToken,
    AnchorToken,
    BlockEndToken,
    BlockMappingStartToken,
    BlockSequenceStartToken,
    FlowMappingEndToken,
    FlowMappingStartToken,
    FlowSequenceEndToken,
    FlowSequenceStartToken,
    YAMLError,
)

from crystallm_jax.errors import ConfigError

ConfigT = TypeVar("ConfigT")

_OPENING = (BlockMappingStartToken, BlockSequenceStartToken, FlowMappingStartToken, FlowSequenceStartToken)
_CLOSING = (BlockEndToken, FlowMappingEndToken, FlowSequenceEndToken)
_DEEPEST = 100


def load_config(
    schema: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Build a `schema` from its defaults, then the YAML file, then the overrides.

    Args:
        schema: a dataclass; its fields are the keys that exist, their types what values must be.
        path: a YAML file of `key: value` lines, or None for the defaults alone.
        overrides: `key=value` texts, as typed on the command line.

    Raises:
        ConfigError: a missing or unreadable file, an unknown key, a value of the wrong type.
    """
    base = OmegaConf.structured(schema)
    layers: list[tuple[str, DictConfig]] = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    layers += [("the command line", _parse_override(text)) for text in overrides]
    for place, layer in layers:
        _check_keys(schema, layer, place)
        try:
            base = OmegaConf.merge(base, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_one_line(error, schema, place)) from None
    try:
        return cast("ConfigT", OmegaConf.to_object(base))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error, schema, str(path or "the defaults"))) from None


def find_config(name: str | Path) -> Path:
    """The configuration file of this path, or of this name among those that ship with the package.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if Path(name).is_file():
        return Path(name)
    # Installed, they lie inside the package; in a checkout, beside it.
    package = Path(__file__).parent
    shipped = [
        path for folder in (package, package.parent) for path in sorted((folder / "configs").glob("*.yaml"))
    ]
    for path in shipped:
        if str(name) in (path.stem, path.name):
            return path
    raise ConfigError(
        f"{name}: no such file; configurations by name are {', '.join(path.stem for path in shipped)}"
    )


def to_yaml(config: Any) -> str:
    """Write a configuration dataclass as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load_plain_yaml(text: str) -> Any:
    """Read YAML of plain values; anchors are refused: a few lines of them can stand for gigabytes.

    Raises:
        YAMLError: it is none, or has anchors.
        ValueError: it is nested too deep.
    """
    try:
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, AnchorToken | AliasToken):
                raise YAMLError("it has anchors (& and *): write the values out")
            # The scanner's time grows with the square of the depth.
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _DEEPEST:
                raise ValueError("it is nested too deep")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
        load_plain_yaml(text)
        loaded = OmegaConf.load(io.StringIO(text))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, YAMLError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise ConfigError(f"{path}: cannot be read as YAML: {first_line}") from None
    if isinstance(loaded, ListConfig) or not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: holds no `key: value` lines")
    return loaded


def _parse_override(text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} on the command line is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([f"{key.strip().removeprefix('--')}={value}"])
    except (OmegaConfBaseException, YAMLError):
        raise ConfigError(f"{text!r} on the command line: {value!r} is not a YAML value; quote it") from None


def _check_keys(schema: type, layer: DictConfig, place: str) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    for key in layer:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown configuration key {key!r} in {place}{hint}")
        value = layer._get_node(key)._value()  # interpolations stay unresolved
        # OmegaConf takes any non-zero number, quoted or not, for true: a `bias=3` is a slip of the hand.
        if fields[key] is bool and _is_number(value) and float(value) not in (0, 1):
            raise ConfigError(f"{key}={value} in {place}: expected true or false")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _one_line(error: OmegaConfBaseException, schema: type, place: str) -> str:
    message = str(error).split("\n", 1)[0].rstrip(".")
    key = str(error.full_key or error.key or "")
    wanted = {
        field.name: getattr(field.type, "__name__", str(field.type)) for field in dataclasses.fields(schema)
    }
    return (
        f"{key} in {place}: {message} (expected {wanted[key]})" if key in wanted else f"{message} in {place}"
    )
