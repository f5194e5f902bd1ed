"""Prompts from a table, a list, a prepared folder, or texts such as the published archives hold."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from crystallm_jax.cif import CIFError, prompt_from_cif
from crystallm_jax.cif.tokenizer import shared_tokenizer
from crystallm_jax.data.reading.archives import tar_members
from crystallm_jax.data.reading.tokenfiles import is_tar_file
from crystallm_jax.data.store import SPLITS, TokenStore
from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.prompts import Prompt, composition_prompts, formula_prompts, prompt_elements

DEFAULT_UNITS = (1, 2, 3, 4)
"""Numbers of formula units that are tried where none are named."""

# The split that prompts are taken from, the held-out ones first.
_SPLIT_ORDER = tuple(reversed(SPLITS))
# Far beyond any prompt: the text of a whole crystal has some thousands of characters.
_LONGEST_TEXT = 1 << 20
_TAR_NAME = re.compile(r"\.(tar(\.gz|\.xz)?|tgz|txz)$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[,;\s]+")
_MOST_DIGITS = 9
_COLUMNS = ("composition", "formula", "z", "spacegroup", "n", "id")
# What such a column may be called elsewhere, in small letters alone.
_MISNAMED = {name: name for name in _COLUMNS} | {"sg": "spacegroup", "spg": "spacegroup"}


def read_prompts(path: str | Path, *, with_spacegroup: bool = False) -> list[Prompt]:
    """Prompts from a file or a folder.

    Args:
        path: one of
            a `.csv` with a column `composition` or `formula` (with `z`, numbers of formula units such as `2,4`) and, if
            wanted, `spacegroup` (one, several separated by commas, or `compatible`), `n` (samples of the prompt)
            and `id`;
            a text file of a composition and, if wanted, such a space group a line;
            a folder made by `crystallm prepare`, whose test records (else validation, else training) are asked for
            by their composition;
            a tar, which may be compressed, or a folder of prompts as texts `ID.txt`, or one such text.
        with_spacegroup: for a prepared folder, ask for the records' space groups too.

    Raises:
        SamplingError: nothing there, no prompt in it, or one that cannot be made, with its place.
        DataError: a prepared folder or archive that cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (with_spacegroup or not any(path.glob("*.txt")) or any(path.glob("*.bin"))):
        prompts = _from_store(path, with_spacegroup)
    elif with_spacegroup:
        raise SamplingError(
            f"{path}: only the records of a prepared folder can be asked for with theirs (--with-spacegroup);"
            " elsewhere the space group stands beside each composition"
        )
    elif path.is_dir():
        prompts = [_from_text(file, file.stem, _read_text(file)) for file in sorted(path.glob("*.txt"))]
    elif not path.is_file():
        raise SamplingError(f"{path}: no such file of prompts")
    else:
        prompts = _from_file(path)
    if not prompts:
        raise SamplingError(f"{path}: holds no prompt")
    return prompts


def _from_file(path: Path) -> list[Prompt]:
    # By its name too, as an empty archive has no first header.
    if _TAR_NAME.search(path.name) or is_tar_file(path):
        return list(_from_tar(path))
    if path.suffix == ".csv":
        try:
            return list(_from_csv(path))
        except UnicodeDecodeError:
            raise _no_text(path) from None
        except OSError as error:
            raise _unreadable(path, error) from None
        except csv.Error as error:
            raise SamplingError(f"{path}: no valid CSV ({error}): check its quotes") from None
    text = _read_text(path)
    return [_from_text(path, path.stem, text)] if text.startswith("data_") else list(_from_lines(path, text))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _no_text(path) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _no_text(place: object) -> SamplingError:
    return SamplingError(f"{place}: not a text file; prompts are a composition a line, or a CSV")


def _unreadable(path: Path, error: OSError) -> SamplingError:
    return SamplingError(f"{path}: cannot be read: {error.strerror}")


def _from_store(folder: Path, with_spacegroup: bool) -> list[Prompt]:
    split = next((name for name in _SPLIT_ORDER if (folder / f"{name}.bin").is_file()), SPLITS[0])
    store = TokenStore.open(folder, split)
    return [
        Prompt(name, prompt_from_cif(store.text(i), with_spacegroup=with_spacegroup))
        for i, name in enumerate(store.ids)
    ]


def _from_tar(path: Path) -> Iterator[Prompt]:
    for member in tar_members(path):
        name = member.name.rsplit("/", maxsplit=1)[-1]
        # The shadows that macOS puts beside every file.
        if name.startswith("._"):
            continue
        place = f"{path}: {member.name[:200]!r}"
        if not name.endswith(".txt"):
            raise SamplingError(f"{place}: no prompt; an archive of prompts holds texts ID.txt alone")
        if member.size > _LONGEST_TEXT:
            raise SamplingError(f"{place}: {member.size:,} bytes are no prompt")
        try:
            text = member.stream.read(member.size).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise _no_text(place) from None
        yield _from_text(place, name.removesuffix(".txt"), text)


def _from_text(place: object, name: str, text: str) -> Prompt:
    """A prompt as it stands, where the vocabulary can express it."""
    if not text.startswith("data_"):
        raise SamplingError(f"{place}: {text[:40]!r}: a prompt begins with data_")
    if "\n\n" in text:
        raise SamplingError(f"{place}: an empty line ends a crystal: a prompt has none")
    prompt = Prompt(name, text)
    try:
        prompt_elements(prompt)
    except CIFError as error:
        raise SamplingError(f"{place}: {error}") from None
    unknown = int((shared_tokenizer().encode_cif(text) == shared_tokenizer().unk_id).sum())
    if unknown:
        raise SamplingError(f"{place}: {unknown} of its words have no token: make prompts with make_prompt")
    return prompt


def _from_csv(path: Path) -> Iterator[Prompt]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        columns = rows.fieldnames or []
        if not {"composition", "formula"}.intersection(columns):
            named = ", ".join(repr(name[:40]) for name in columns[:12]) or "none"
            raise SamplingError(f"{path}: no column 'composition' or 'formula'; the columns are {named}")
        for column in columns:
            meant = _MISNAMED.get(re.sub("[^a-z]", "", column.lower()))
            if meant is not None and column not in _COLUMNS:
                raise SamplingError(f"{path}: column {column[:40]!r} would not be read: write {meant!r}")
        for row in rows:
            if None in row:
                raise SamplingError(
                    f"{path}:{rows.line_num}: more fields than the {len(columns)} columns: quote what holds commas"
                )
            fields = {key: value.strip() for key, value in row.items() if isinstance(value, str)}
            try:
                prompts = _row_prompts(fields)
                n = _number("n", fields["n"]) if fields.get("n") else None
            except (CIFError, SamplingError) as error:
                raise SamplingError(f"{path}:{rows.line_num}: {error}") from None
            name = fields.get("id")
            for prompt in prompts:
                # Several prompts of one row are told from each other by what they ask for.
                own = prompt.id if not name else name if len(prompts) == 1 else f"{name}_{prompt.id}"
                yield Prompt(own, prompt.text, n)


def _row_prompts(fields: dict[str, str]) -> list[Prompt]:
    composition, formula = fields.get("composition"), fields.get("formula")
    spacegroup, z = fields.get("spacegroup") or None, fields.get("z")
    if composition and formula:
        raise SamplingError("both a composition and a formula: give one")
    if not formula and z:
        raise SamplingError(
            f"z={z}: numbers of formula units go with a formula; a composition counts the cell"
        )
    if not formula:
        return composition_prompts(composition or "", spacegroup)
    units = [_number("z", part) for part in _SEPARATORS.split(z)] if z else DEFAULT_UNITS
    return formula_prompts(formula, units, spacegroup)


def _number(column: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) > 0):
        raise SamplingError(f"{column}={text[:40]!r}: expected whole numbers from 1 on")
    return int(text)


def _from_lines(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) > 2:
            raise SamplingError(
                f"{path}:{number}: {line.strip()[:60]!r}: expected a composition and at most a space group"
            )
        try:
            yield from composition_prompts(words[0], words[1] if len(words) > 1 else None)
        except (CIFError, SamplingError) as error:
            raise SamplingError(f"{path}:{number}: {error}") from None
