"""Reasons: dropped records are counted by what is said of them, whatever is named."""

import pytest

from crystallm_jax.data.reasons import OTHER_REASONS, DroppedGroup, Reasons


def _groups(*reasons: str, stage: str = "parse") -> list[tuple[str, int]]:
    counted = Reasons()
    for reason in reasons:
        counted.add(stage, reason)
    return [(group.reason, group.inputs) for group in counted.groups()]


def test_a_reason_that_is_the_same_for_all_stands_as_it_is() -> None:
    same = "the cell has 1,200 atoms, at most 1,000 are taken: leave it out"
    assert _groups(same, same) == [(same, 2)]


def test_no_record_is_named_as_the_reason_of_others() -> None:
    reasons = [f"same cell formula and space group as 'mp-{i}'" for i in range(3)]
    assert _groups(*reasons) == [("same cell formula and space group as …", 3)]
    assert _groups(reasons[1]) == [(reasons[1], 1)]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (
            "the cell has 1,200 atoms, at most 1,000 are taken: leave it out",
            "the cell has 20,000 atoms, at most 1,000 are taken: leave it out",
            "the cell has … atoms, at most 1,000 are taken: leave it out",
        ),
        (
            "same reduced formula as 'O'Brien's', which is to be excluded",
            "same reduced formula as 'x', which is to be excluded",
            "same reduced formula as …, which is to be excluded",
        ),
        (
            "a file's block 'a' and a CIF's end",
            "a file's block \"it's b\" and a CIF's end",
            "a file's block … and a CIF's end",
        ),
        (
            "site 0 holds Fe:0.500, Ni:0.500: partial occupancies cannot be written",
            "site 12 holds O:0.250: partial occupancies cannot be written",
            "site … holds …: partial occupancies cannot be written",
        ),
        (
            "no structure could be read (it has ['a', 'b'] and -1.5e-05, 2): check the CIF",
            "no structure could be read (it has ['c'] and 3): check the CIF",
            "no structure could be read (it has […] and …): check the CIF",
        ),
        ("/data/sub/a.cif is empty", "/data/b.cif is empty", "… is empty"),
        (
            "row 3 (line 7) has an empty 'cif'",
            "row 4 (line 9) has an empty 'cif'",
            "row … (line …) has an empty 'cif'",
        ),
        ("Na4Cl4 is P-1.", "K4Cl4 is P2_1/c.", "… is …."),
    ],
    ids=["number", "apostrophe", "quotes", "list", "brackets", "file", "row", "formula"],
)
def test_what_differs_is_left_open(first: str, second: str, shown: str) -> None:
    assert _groups(first, second) == [(shown, 2)]


def test_reasons_that_say_something_else_and_stages_stay_apart() -> None:
    counted = Reasons()
    for stage, reason in [
        ("dedup", "same as 'a'"),
        ("merge", "same as 'a'"),
        ("merge", "same as 'b'"),
        ("merge", "not the same as 'a'"),
        ("merge", "the same"),
    ]:
        counted.add(stage, reason)
    assert counted.groups() == (
        DroppedGroup("merge", "same as …", 2, "same as 'a'"),
        DroppedGroup("dedup", "same as 'a'", 1, "same as 'a'"),
        DroppedGroup("merge", "not the same as 'a'", 1, "not the same as 'a'"),
        DroppedGroup("merge", "the same", 1, "the same"),
    )


def test_endless_kinds_of_reasons_are_counted_by_stage() -> None:
    counted = Reasons(most=2)
    for word in ("one", "two", "three", "four", "one"):
        counted.add("parse", word)
    counted.add("limit", "five")
    assert [(group.stage, group.reason, group.inputs) for group in counted.groups()] == [
        ("parse", "one", 2),
        ("parse", OTHER_REASONS, 2),
        ("parse", "two", 1),
        ("limit", OTHER_REASONS, 1),
    ]


@pytest.mark.parametrize("piece", ["'a ", "a", "a.", ", 1", "1,"])
def test_long_reasons_take_no_time(piece: str) -> None:
    assert _groups(piece * 100_000)[0][1] == 1
