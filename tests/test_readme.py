"""What the README and the pages of docs/ show works: their Python, their commands, their links and names of files."""

import argparse
import dataclasses
import os
import re
import shlex
from pathlib import Path

import pytest

from crystallm_jax.cli.flags import add_verbs
from crystallm_jax.train_run.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def _blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def _prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crystallm")
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    return parser


def _commands(page: Path) -> list[list[str]]:
    """The words of each `crystallm` command that a page shows, without what a shell takes for itself."""
    found = []
    for block in _blocks(page, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if "crystallm " in line else []
            if "crystallm" in words:
                found.append(words[words.index("crystallm") + 1 :])
    return found


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _flags_of_scripts() -> set[str]:
    """The flags that tools/, benchmarks/ and the commands around them know."""
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    return {flag for script in scripts for flag in re.findall(r"--[a-z][a-z-]*", script.read_text())}


def test_the_commands_of_all_verbs_are_shown():
    shown = {words[0] for page in PAGES for words in _commands(page)}
    assert {"prepare", "info", "train", "sample", "score", "compile", "convert", "embeddings"} <= shown


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=_name)
def test_the_python_of_the_pages_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in _blocks(page, "python"):
        exec(compile(block, _name(page), "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    assert page != README or "data_Na4Cl4" in printed


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_links_of_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / place)) if place else page
        assert target.exists(), f"{_name(page)} links to {link}"
        assert not anchor or anchor in _anchors(target), f"{_name(page)} links to {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)], ids=_name)
def test_the_commands_of_the_pages_are_understood(page):
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    for words in _commands(page):
        # HOST:PORT, $level and M stand for what the reader has.
        parsed, left = _parser().parse_known_args([word.replace("$level", "symmetry") for word in words])
        overrides = [*getattr(parsed, "overrides", []), *left]
        assert not left or hasattr(parsed, "overrides"), words
        assert {override.partition("=")[0] for override in overrides} <= settings, words


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_flags_in_the_prose_of_the_pages_exist(page):
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    known = _flags_of_scripts() | {
        flag for verb in verbs.choices.values() for action in verb._actions for flag in action.option_strings
    }
    code = " ".join(re.findall(r"`([^`\n]+)`", _prose(page)))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code))
    # Of other programs.
    assert named - known <= {"--worker", "--logdir", "--command"}


def test_the_files_and_names_of_the_architecture_exist():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 50
    for file, name in named:
        text = (ROOT / "crystallm_jax" / file).read_text()
        assert re.search(rf"\b(def|class) {name}\b", text), f"{file} defines no {name}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_files_that_the_pages_name_exist(page):
    """Paths from the root of the checkout, in code font."""
    folders = "configs|benchmarks|tools|tests|crystallm_jax"
    for path in re.findall(rf"`((?:{folders})/[\w/.-]*)`", _prose(page)):
        if "NAME" not in path:
            assert (ROOT / path).exists(), f"{_name(page)} names {path}"
