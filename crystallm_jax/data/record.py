"""A record: one crystal as it was found in a file, before anything is done to it."""

from typing import Literal, NamedTuple

Form = Literal["cif", "extxyz", "json"]
"""How a record's text is to be read: a CIF, one extended-XYZ frame, or a JSON object that holds a structure."""


class Record(NamedTuple):
    """One crystal as it was found; `problem` says why it could not be read (then `text` is empty)."""

    id: str
    text: str
    problem: str | None = None
    form: Form = "cif"
