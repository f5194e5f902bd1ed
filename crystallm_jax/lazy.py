"""Names of a package that are loaded when they are first used."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class LazyNames(NamedTuple):
    """A package's `__getattr__` and `__dir__`."""

    get: Callable[[str], Any]
    names: Callable[[], list[str]]


def lazy_names(package: str, modules: Mapping[str, str]) -> LazyNames:
    """How a package finds names in its modules.

    Args:
        package: its `__name__`.
        modules: by name, which of its modules defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return LazyNames(get, lambda: sorted(modules))
