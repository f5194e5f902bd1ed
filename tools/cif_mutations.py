"""Ways to break a CIF text, each a pure function of the text and a random generator, for `fuzz_cif.py`."""

import random
import re
from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:\(\d+\))?")
_TAG = re.compile(r"(?<!\S)_[\w.\-/]+")
_WORD = re.compile(r"\S+")
_OPERATOR = re.compile(r"['\"]?[-+xyzXYZ\d/. ]+,[-+xyzXYZ\d/. ]+,[-+xyzXYZ\d/. ]+['\"]?")
_CELL_LINE = re.compile(r"^(\s*_cell_(?:length_[abc]|angle_\w+)\s+)\S+", re.MULTILINE)

# fmt: off
_NUMBERS = (
    "nan", "inf", "-inf", "1e999", "-1e999", "1e-999", "-0", "0", "0.0", "", "?", ".", "-", "+", "()", "1()", "(3)",
    "99999999999999999999", "9" * 400, "1e308", "-1", "0x10", "1_0", "1.2.3", "1,5", "٣", "²", "½", "１", "1/3",
    "0.33333", "0.99999999", "1e-9", "1.0000001", "0.5(12345678901)", "-17.25", "1e6", "1j", "True", "None",
)
_OPERATORS = (
    "x,y,z/0", "x+1e9,y,z", "x,y", "x,y,z,w", "", "x y z", "x,y,z+1/0", "-x,-x,-x", "0,0,0", "2x,y,z", "x*x,y,z",
    "x+1/3,y+1/7,z+1/11", "x,y,z;", "nan,y,z", "1/2+x,1/2-y,-z", "x,y,__import__('os')", "xx,yy,zz", "x+y+z,x-y,z/3",
    "x,y,0.5+z", "+x,+y,+z", "X,Y,Z", "x,y,9999999999999999999999z", "(x),y,z", "x,,z", "x/2,y/2,z/2", "a,b,c",
)
_TOKENS = (
    "data_", "data_x", "loop_", "save_", "stop_", "global_", "_", ";", "\n;\n", "'", '"', "''", "#", "$", "[", "{",
    "\\", "\x00", "\ufeff", "\u2028", "\x0c", "\x1f", "\r", "\x85", "é", "🧂", "_cell_length_a", "_atom_site_label",
    "_symmetry_equiv_pos_as_xyz", "_symmetry_space_group_name_H-M", "_atom_site_fract_x", "_cell_formula_units_Z 0",
    "_chemical_formula_sum ''", "_atom_site_occupancy", "_atom_site_aniso_U_11", "_atom_site_moment_label",
    "_space_group_IT_number 231", "_symmetry_Int_Tables_number -1", "_symmetry_space_group_name_H-M 'P 1'",
    "_space_group_magn.name_BNS P1", "_space_group_magn.transform_BNS_Pp_abc 9**9**9**9*a,b,c;0,0,0",
    "_symmetry_cell_setting cubic", "_symmetry_cell_setting from_dict",
    "_atom_type_oxidation_number", "_cell_formula_units_Z .", "_chemical_formula_sum Na99999999999",
)
_SYMBOLS = ("Na", "Cl", "X", "D", "T", "Po", "Fe3+", "O2-", "Fe+3.5", "H1", "Q", "0+", "na", "CL", "Zzz", "Hg99", "?",
            "Vac", "Wat", "OH", "Na1_2", "Fm", "P", "C1A", "Og", "nan", "é", "Ca:K", "H-", "O--", "Ti9+", "*")
_CHARACTERS = "\n\n\t\r\0 '\";#_.,()+-/0123456789eExyzNaCl?é٣\u2028\ufeff"
# fmt: on

Mutation = Callable[[str, random.Random], str]


def _spot(text: str, rng: random.Random) -> int:
    return rng.randint(0, len(text))


def _replace_one(pattern: re.Pattern[str], choices: Sequence[str], text: str, rng: random.Random) -> str:
    found = list(pattern.finditer(text))
    if not found:
        return text
    match = rng.choice(found)
    return text[: match.start()] + rng.choice(choices) + text[match.end() :]


def _characters(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = _spot(text, rng)
        cut = rng.choice((0, 1, 1))
        text = text[:place] + rng.choice(_CHARACTERS) * rng.choice((0, 1, 1)) + text[place + cut :]
    return text


def _bits(text: str, rng: random.Random) -> str:
    data = bytearray(text.encode())
    for _ in range(rng.choice((1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data.decode(errors="replace")


def _delete_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    del lines[place : place + rng.choice((1, 1, 1, 2, 5, 20))]
    return "\n".join(lines)


def _repeat_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    some = lines[place : place + rng.choice((1, 1, 2, 8))]
    other = rng.randrange(len(lines))
    return "\n".join([*lines[:other], *some * rng.choice((1, 1, 2, 30)), *lines[other:]])


def _swap_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "\n".join(lines)


def _shuffle_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    a = rng.randrange(len(lines))
    some = lines[a : a + rng.choice((4, 12, 1000))]
    rng.shuffle(some)
    return "\n".join([*lines[:a], *some, *lines[a + len(some) :]])


def _numbers(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 4))):
        text = _replace_one(_NUMBER, _NUMBERS, text, rng)
    return text


def _all_numbers(text: str, rng: random.Random) -> str:
    value = rng.choice(_NUMBERS)
    share = rng.choice((0.1, 0.5, 1.0))
    return _NUMBER.sub(lambda match: value if rng.random() < share else match[0], text)


def _tags(text: str, rng: random.Random) -> str:
    found = list(_TAG.finditer(text))
    if not found:
        return text
    match = rng.choice(found)
    tag = match[0]
    place = rng.randrange(len(tag))
    edited = rng.choice(
        (
            tag[:place] + tag[place + 1 :],
            tag.upper(),
            tag.replace("_", "."),
            tag + "_",
            rng.choice(found)[0],
            tag[1:],
            tag.replace("symmetry", "space_group"),
        )
    )
    return text[: match.start()] + edited + text[match.end() :]


def _truncate(text: str, rng: random.Random) -> str:
    place = _spot(text, rng)
    return text[:place] if rng.random() < 0.7 else text[place:]


def _insert(text: str, rng: random.Random) -> str:
    place = _spot(text, rng)
    if rng.random() < 0.6:
        place = text.find("\n", place) + 1
    glue = rng.choice(("", " ", "\n"))
    return text[:place] + glue + rng.choice(_TOKENS) + glue + text[place:]


def _words(text: str, rng: random.Random) -> str:
    found = [match[0] for match in _WORD.finditer(text)] or [""]
    return _replace_one(_WORD, [*rng.sample(found, min(8, len(found))), *_TOKENS[:20], ""], text, rng)


def _columns(text: str, rng: random.Random) -> str:
    """Rows of a loop with a field too many or too few."""
    lines = text.split("\n")
    rows = [i for i, line in enumerate(lines) if len(line.split()) > 3]
    for i in rng.sample(rows, min(len(rows), rng.choice((1, 1, 3, 100)))):
        fields = lines[i].split()
        place = rng.randrange(len(fields))
        lines[i] = " ".join(rng.choice((fields[:place] + fields[place + 1 :], [*fields, "7"])))
    return "\n".join(lines)


def _symbols(text: str, rng: random.Random) -> str:
    pattern = re.compile(r"(?<=\s)(?:[A-Z][a-z]?[0-9]*[-+]?)(?=\s)")
    for _ in range(rng.choice((1, 1, 3))):
        text = _replace_one(pattern, _SYMBOLS, text, rng)
    return text


def _operators(text: str, rng: random.Random) -> str:
    quote = rng.choice(("'", "'", '"', ""))
    return _replace_one(_OPERATOR, [f"{quote}{one}{quote}" for one in _OPERATORS], text, rng)


def _cell(text: str, rng: random.Random) -> str:
    """A cell that is flat, huge, tiny or none."""
    value = rng.choice(
        ("0", "0.0", "180", "179.9999", "1e-8", "1e8", "-90", "nan", "inf", "120", "60", "1", "90.0001")
    )
    share = rng.choice((0.3, 0.6, 1.0))
    return _CELL_LINE.sub(lambda match: match[1] + value if rng.random() < share else match[0], text)


def _many_operators(text: str, rng: random.Random) -> str:
    count = rng.choice((50, 400, 3000))
    loop = ["loop_", "_symmetry_equiv_pos_as_xyz"]
    loop += [f"'x+{rng.randint(1, 96)}/97,y+{i}/{count + 1},z'" for i in range(count)]
    place = text.find("\n") + 1
    return text[:place] + "\n".join(loop) + "\n" + text[place:]


def _many_sites(text: str, rng: random.Random) -> str:
    lines = text.rstrip("\n").split("\n")
    fields = lines[-1].split()
    if len(fields) < 4:
        return text
    extra = []
    for i in range(rng.choice((20, 300, 2500))):
        row = [f"{rng.random():.4f}" if re.fullmatch(r"0?\.\d+", field) else field for field in fields]
        if rng.random() < 0.5:
            row[1] = f"{row[1]}_{i}"
        extra.append(" ".join(row))
    return "\n".join([*lines, *extra, ""])


def _long(text: str, rng: random.Random) -> str:
    """A very long line, word, run of blanks or of quotes."""
    piece = rng.choice(
        ("a", " ", "'", '"', "\n", "_", ";\n", "a ", "'a' ", "(", "0", "\n\n ", "data_a\n", "loop_\n", "\t")
    )
    place = _spot(text, rng)
    return text[:place] + piece * rng.choice((200, 3000, 60_000)) + text[place:]


def _text_field(text: str, rng: random.Random) -> str:
    """A text field between semicolons, closed or not."""
    place = text.find("\n", _spot(text, rng)) + 1
    field = rng.choice(
        (";\nsome text\n;\n", ";some\n", ";\n", ";\n;\n", "_x\n;\ndata_y\nloop_\n;\n", "\n;'\n;\n")
    )
    return text[:place] + field + text[place:]


def _blocks(text: str, rng: random.Random) -> str:
    return text + rng.choice(("", "\n")) + text * rng.choice((1, 1, 2, 12))


MUTATIONS: tuple[Mutation, ...] = (
    _characters, _bits, _delete_lines, _repeat_lines, _swap_lines, _shuffle_lines, _numbers, _numbers,
    _all_numbers, _tags, _truncate, _insert, _words, _columns, _symbols, _operators, _cell, _text_field, _blocks,
)  # fmt: skip
"""What is drawn from; those that make a text large are in `LARGE`, since they take most of the time."""

LARGE: tuple[Mutation, ...] = (_many_operators, _many_sites, _long)


def splice(first: str, second: str, rng: random.Random) -> str:
    """The beginning of one text and the end of another, cut at lines or anywhere."""
    a, b = _spot(first, rng), _spot(second, rng)
    if rng.random() < 0.5:
        a, b = first.rfind("\n", 0, a) + 1, second.rfind("\n", 0, b) + 1
    return first[:a] + second[b:]


def mutated(seeds: Sequence[str], seed: int, number: int) -> str:
    """Text `number` of the campaign `seed`: one of the seeds, changed one to four times."""
    rng = random.Random(f"{seed}:{number}")
    text = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        draw = rng.random()
        if draw < 0.06:
            text = splice(text, rng.choice(seeds), rng)
        elif draw < 0.09:
            text = rng.choice(LARGE)(text, rng)
        else:
            text = rng.choice(MUTATIONS)(text, rng)
    return text
