"""Prompts and their names, from a composition, a formula, a file or a prepared folder."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from crystallm_jax.cif import UNCONDITIONAL_PROMPT, CIFError, make_prompt, prompt_from_cif
from crystallm_jax.cif.formula import cell_formula, parse_formula
from crystallm_jax.data.store import SPLITS, TokenStore
from crystallm_jax.errors import SamplingError

# The split that prompts are taken from, the held-out ones first.
_SPLIT_ORDER = tuple(reversed(SPLITS))
# File systems take 255 bytes; the number of the sample and an ending follow.
_LONGEST_NAME = 200


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        id: the name that its samples' files begin with.
        text: that the model completes.
        n: how many samples of it; None leaves it to the request.
    """

    id: str
    text: str
    n: int | None = None


def unconditional_prompt() -> Prompt:
    """Leaves even the composition to the model."""
    return Prompt("unconditional", UNCONDITIONAL_PROMPT)


def composition_prompt(composition: str, spacegroup: str | None = None) -> Prompt:
    """A prompt for the whole cell's composition.

    Raises:
        CIFError: a composition or space group that the vocabulary cannot express.
    """
    text = make_prompt(composition, spacegroup)
    name = cell_formula(parse_formula(composition))
    return Prompt(name if spacegroup is None else f"{name}_{spacegroup}", text)


def formula_prompts(formula: str, z: Sequence[int], spacegroup: str | None = None) -> list[Prompt]:
    """A prompt for each number of formula units in the cell.

    Raises:
        CIFError: a formula or space group that the vocabulary cannot express.
        SamplingError: a number below 1.
    """
    if not z or min(z) < 1:
        raise SamplingError(f"z={','.join(map(str, z))}: numbers of formula units start at 1")
    counts = parse_formula(formula)
    cells = ["".join(f"{symbol}{n * count}" for symbol, count in counts.items()) for n in z]
    return [composition_prompt(cell, spacegroup) for cell in cells]


def read_prompts(path: str | Path, *, with_spacegroup: bool = False) -> list[Prompt]:
    """Prompts from a file or a prepared folder.

    Args:
        path: a `.csv` with a column `composition` and, if wanted, `spacegroup` and `id`; a text file of a composition
            and, if wanted, a space group a line; or a folder made by `crystallm prepare`, whose test records (else
            validation, else training) are asked for by their composition.
        with_spacegroup: for a prepared folder, ask for the records' space groups too.

    Raises:
        SamplingError: nothing there, no prompt in it, or one that cannot be made, with its line.
    """
    path = Path(path)
    if path.is_dir():
        prompts = _from_store(path, with_spacegroup)
    elif not path.is_file():
        raise SamplingError(f"{path}: no such file of prompts")
    else:
        try:
            prompts = list(_from_csv(path) if path.suffix == ".csv" else _from_lines(path))
        except UnicodeDecodeError:
            raise SamplingError(
                f"{path}: not a text file; prompts are a composition a line, or a CSV"
            ) from None
        except OSError as error:
            raise SamplingError(f"{path}: cannot be read: {error.strerror}") from None
        except csv.Error as error:
            raise SamplingError(f"{path}: no valid CSV ({error}): check its quotes") from None
    if not prompts:
        raise SamplingError(f"{path}: holds no prompt")
    return prompts


def unique_ids(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts with names that are unlike each other and fit a file name on every system."""
    seen: set[str] = set()
    renamed = []
    for prompt in prompts:
        base = re.sub(r"[^A-Za-z0-9._+-]", "-", prompt.id)[:_LONGEST_NAME].strip(".") or "prompt"
        name, number = base, 1
        while name.lower() in seen:
            number += 1
            name = f"{base}-{number}"
        seen.add(name.lower())
        renamed.append(Prompt(name, prompt.text))
    return renamed


def _from_store(folder: Path, with_spacegroup: bool) -> list[Prompt]:
    split = next((name for name in _SPLIT_ORDER if (folder / f"{name}.bin").is_file()), SPLITS[0])
    store = TokenStore.open(folder, split)
    return [
        Prompt(name, prompt_from_cif(store.text(i), with_spacegroup=with_spacegroup))
        for i, name in enumerate(store.ids)
    ]


def _from_csv(path: Path) -> Iterator[Prompt]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        if "composition" not in (rows.fieldnames or []):
            columns = ", ".join(repr(name[:40]) for name in (rows.fieldnames or [])[:12]) or "none"
            raise SamplingError(f"{path}: no column 'composition'; the columns are {columns}")
        for row in rows:
            yield _prompt(path, rows.line_num, row["composition"], row.get("spacegroup"), row.get("id"))


def _from_lines(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) > 2:
            raise SamplingError(
                f"{path}:{number}: {line.strip()[:60]!r}: expected a composition and at most a space group"
            )
        yield _prompt(path, number, words[0], words[1] if len(words) > 1 else None, None)


def _prompt(
    path: Path, line: int, composition: str | None, spacegroup: str | None, name: str | None
) -> Prompt:
    try:
        prompt = composition_prompt((composition or "").strip(), (spacegroup or "").strip() or None)
    except CIFError as error:
        raise SamplingError(f"{path}:{line}: {error}") from None
    return Prompt(name.strip(), prompt.text) if name and name.strip() else prompt
