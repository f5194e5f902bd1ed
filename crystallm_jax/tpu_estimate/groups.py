"""Which devices talk in a collective, and along which axes of the mesh."""

import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_SUB_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def parse_groups(attributes: str, devices: int) -> Groups:
    """Groups of positions in the mesh, from an instruction's attributes, in any of the forms that XLA writes.

    Those are `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)` and `mesh['a'=2,'b'=2] {'a'}`; source and target pairs are groups
    of two. Without any, all devices make one group.

    Raises:
        ValueError: a form that is not known.
    """
    if found := _MESH.search(attributes):
        return _mesh_groups(found[1], found[2], found[3])
    if found := _IOTA.search(attributes):
        sizes = _integers(found[1])
        return _rows(_iota(found[2]).reshape(sizes))
    if found := _LIST.search(attributes):
        groups = tuple(_integers(group) for group in re.findall(r"\{([\d,]+)\}", found[1]))
        return groups or (tuple(range(devices)),)
    if "replica_groups=" in attributes:
        raise ValueError(f"unknown replica groups: {attributes[attributes.index('replica_groups=') :][:120]}")
    return (tuple(range(devices)),)


def spanned_axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the mesh's axes along which members of a group differ.

    Args:
        groups: positions in the mesh, the last axis fastest.
        mesh: sizes by name.
    """
    shape = tuple(mesh.values())
    varying = np.zeros(len(shape), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.asarray(group), shape))
        varying |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, varies in zip(mesh, varying, strict=True) if varies)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _iota(text: str) -> np.ndarray:
    """`[2,2]T(1,0)`: numbers from 0 in that shape, transposed, flat."""
    sizes, _, order = text.partition("]")
    shape = _integers(sizes.removeprefix("["))
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    if order:
        numbers = numbers.transpose(_integers(order.removeprefix("T(").removesuffix(")")))
    return numbers.reshape(-1)


def _mesh_groups(axes: str, order: str | None, named: str) -> Groups:
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    numbers = np.arange(np.prod(list(sizes.values()), dtype=int))
    if order:
        numbers = _iota(order) if order.startswith("[") else np.array(_integers(order))
    # An axis of which only a part is named is taken apart: before it, the part, after it.
    parts = {name: (part, size) for name, part, size in _SUB_AXIS.findall(named)}
    shape: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        if name not in parts:
            shape.append(size)
            continue
        before, middle = (int(parts[name][0]), int(parts[name][1])) if parts[name][0] else (1, size)
        inside.append(len(shape) + 1)
        shape += [before, middle, size // (before * middle)]
    grid = numbers.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in inside]
    count = int(np.prod([shape[axis] for axis in inside], dtype=int))
    return _rows(grid.transpose(*rest, *inside).reshape(-1, count))


def _rows(numbers: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in numbers)
