"""The house: imports run one way along the line of rooms, some rooms know no JAX, and nothing grows too long."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "crystallm_jax"
# As docs/architecture.md has it.
ROOMS = (
    ("errors", "config", "processes", "lazy", "files", "signals"),
    ("cif",),
    ("data",),
    ("artifacts",),
    ("model",),
    ("hosts",),
    ("train_run",),
    ("models",),
    ("training",),
    ("sampling",),
    ("tpu_estimate",),
    ("evaluation",),
    ("samples",),
    ("numpy_model",),
    ("api",),
    ("sample_run", "probe", "embeddings"),
    ("cli", "__main__"),
)
PLACE = {name: place for place, names in enumerate(ROOMS) for name in names}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}
WITHOUT_JAX = (
    "errors",
    "config",
    "processes",
    "lazy",
    "files",
    "signals",
    "cif",
    "data",
    "artifacts",
    "evaluation",
    "samples",
    "embeddings",
)
FEEDING = "data/feed.py"
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


class Import(NamedTuple):
    file: str
    line: int
    module: str


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def _room(path: str) -> str:
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(file: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(_name(file), node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}:{node.lineno}: imports are absolute"
            yield Import(_name(file), node.lineno, node.module)
            if node.module == "crystallm_jax":
                for alias in node.names:
                    yield Import(_name(file), node.lineno, f"crystallm_jax.{alias.name}")


def _own_imports() -> list[tuple[Import, str]]:
    """(import, room that it reaches) for every import of the package by itself, but for its lazy front door."""
    found = []
    for file in _files():
        for item in _imports(file):
            parts = item.module.split(".")
            if parts[0] == "crystallm_jax" and len(parts) > 1 and _name(file) != "__init__.py":
                found.append((item, parts[1]))
    return [(item, room) for item, room in found if room != "__version__"]


def test_every_module_has_a_room() -> None:
    homeless = [_name(file) for file in _files() if _room(_name(file)) not in {*PLACE, "__init__"}]
    assert homeless == []
    assert len(_own_imports()) > 50


def test_no_module_imports_from_a_room_to_its_right() -> None:
    back = [
        f"{item.file}:{item.line} imports {item.module}"
        for item, room in _own_imports()
        if PLACE[room] > PLACE[_room(item.file)]
    ]
    assert back == []


def test_the_front_door_loads_rooms_only_when_asked() -> None:
    front = _parsed(PACKAGE / "__init__.py")
    eager = [node for node in front.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {node.module for node in eager if isinstance(node, ast.ImportFrom)} <= {"importlib", "typing"}
    assert not any(isinstance(node, ast.Import) for node in eager)


def test_modules_do_not_import_in_a_circle() -> None:
    modules = {
        ".".join(("crystallm_jax", *Path(_name(file)).with_suffix("").parts)): file for file in _files()
    }
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    edges = {
        name: {reached for reached in _reached(file, modules) if reached in modules} - {name, PACKAGE.name}
        for name, file in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' → '.join((*trail, name))}"
        if name not in done:
            for reached in edges[name]:
                visit(reached, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert done == modules.keys()


def _reached(file: Path, modules: Collection[str]) -> Iterator[str]:
    """The modules of the package that a file imports, inside of functions too, but for the front door."""
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ImportFrom):
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in modules else node.module for name in inner)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_rooms_for_people_without_an_accelerator_know_no_jax() -> None:
    named = [
        f"{item.file}:{item.line} imports {item.module}"
        for file in _files()
        if _room(_name(file)) in WITHOUT_JAX and _name(file) != FEEDING
        for item in _imports(file)
        if item.module.split(".")[0] in JAX or item.module == "crystallm_jax.data.feed"
    ]
    assert named == []
    reached = {room for item, room in _own_imports() if _room(item.file) in WITHOUT_JAX}
    assert reached <= {*WITHOUT_JAX}


def test_orbax_and_attention_backends_are_named_in_one_place_each() -> None:
    orbax = {item.file for file in _files() for item in _imports(file) if item.module.startswith("orbax")}
    assert orbax == {"models/orbax_arrays.py", "training/checkpoint.py"}
    kernels = {
        _name(file) for file in _files() if "dot_product_attention" in file.read_text(encoding="utf-8")
    }
    assert kernels == {"model/attention.py"}


@pytest.mark.parametrize("module", ["pickle", "torch", "random"])
def test_what_the_style_forbids_is_not_imported(module: str) -> None:
    allowed = {"pickle": {"models/torch_file.py"}}.get(module, set())
    users = {item.file for file in _files() for item in _imports(file) if item.module == module}
    assert users <= allowed


def test_files_and_functions_are_short() -> None:
    long = []
    for file in _files():
        text = file.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES:
            long.append(f"{_name(file)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
                if lines > MOST_FUNCTION_LINES:
                    long.append(f"{_name(file)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0


def test_there_is_no_drawer_for_everything() -> None:
    names = {part for file in _files() for part in Path(_name(file)).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_entry_points_are_thin() -> None:
    for name in ("train.py", "sample.py"):
        assert len((PACKAGE.parent / name).read_text(encoding="utf-8").splitlines()) < 60
