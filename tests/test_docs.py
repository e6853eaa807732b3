"""The documentation goes with the project: no dead link, settings explained, commands that exist, valid project files."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
import yaml
from markdown_it import MarkdownIt

from docs import reference
from stages.tag2mask import COMMANDS, command_of
from tests.toys import PROJECT

PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), PROJECT / "data" / "weights" / "README.md"])
RECIPES = sorted((PROJECT / "recipes").glob("*/*.yaml"))
VALID = {  # file or pattern → the schema that check-jsonschema brings along, or a file
    "CITATION.cff": ["--builtin-schema", "vendor.citation-file-format"],
    ".github/workflows/*.yml": ["--builtin-schema", "vendor.github-workflows"],
    ".github/ISSUE_TEMPLATE/*.yml": ["--builtin-schema", "vendor.github-issue-forms"],
    "recipes/*/*.yaml": ["--schemafile", "recipes/schema.json"],
}


@cache
def tokens(page: Path) -> list[Any]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            yield from (str(child.attrs[name]) for name in ("href", "src") if name in child.attrs)


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    parsed = tokens(page)
    headings = (parsed[at + 1].children or () for at, token in enumerate(parsed) if token.type == "heading_open")
    texts = ("".join(part.content for part in parts) for parts in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_link_between_files_leads_to_a_file_and_a_heading(page: Path) -> None:
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_pictures_are_small() -> None:
    pictures = [path for path in (PROJECT / "docs").rglob("*") if path.suffix in (".png", ".webp", ".jpg")]
    assert pictures and all(path.stat().st_size < 300_000 for path in pictures)


def test_the_reference_is_fresh() -> None:
    assert reference.PAGE.read_text("utf-8") == reference.text(), "run `python -m docs.reference`"


def keys(value: Any, path: str, free: set[str]) -> Iterator[str]:
    """Keys of a recipe, but for those inside a mapping of names that the user chooses (`free`)."""
    if isinstance(value, dict) and path not in free:
        for key, part in value.items():
            yield f"{path}.{key}"
            yield from keys(part, f"{path}.{key}", free)
    if isinstance(value, list):
        for part in value:
            yield from keys(part, f"{path}[]", free)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_key_of_a_recipe_is_in_the_reference(recipe: Path) -> None:
    page = reference.PAGE.read_text("utf-8")
    free = set(re.findall(r"^\| `([^`]+)` \| names, each with", page, re.MULTILINE))
    sections = yaml.safe_load(recipe.read_text("utf-8"))
    assert [key for name in sections for key in keys(sections[name], name, free) if f"| `{key}` |" not in page] == []


def test_every_key_that_a_recipe_may_have_has_a_meaning() -> None:
    """But for the word that says which of several alternatives the keys beside it belong to: it has no other value."""
    listed = [row for name, section in reference.recipe_sections().items() for row in reference.rows(name, section)]
    assert len(listed) > 300
    assert [key for key, allowed, meaning in listed if not meaning and not re.fullmatch(r"`\w+`", allowed)] == []


def code(page: Path) -> Iterator[str]:
    """Text of code blocks and of code in lines."""
    for token in tokens(page):
        if token.type in ("code_block", "fence"):
            yield token.content
        yield from (child.content for child in token.children or () if child.type == "code_inline")


@cache
def options_of(name: str) -> set[str]:
    """Of a command of the console, `--help` among them."""
    command = command_of(COMMANDS[name][0]) if name in COMMANDS else click.Group()
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    return {"--help", *(option for part in commands for param in part.params for option in param.opts)}


def test_every_command_in_the_documentation_exists() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    missing = set()
    for page in PAGES:
        for text in code(page):
            named = re.findall(r"(?:^|&& |`)\s*make ([a-z]+)", text, re.MULTILINE)
            missing |= {f"make {target}" for target in named if target not in targets}
            for name, words in re.findall(r"(?:^\s*|&& )tag2mask ([a-z][\w-]*)\b(?! \d)([^\n#]*)", text, re.MULTILINE):
                options = re.findall(r"(?<= )--[a-z][\w-]*", words)
                missing |= {f"tag2mask {name} {option}" for option in options if option not in options_of(name)}
                missing |= set() if name in COMMANDS else {f"tag2mask {name}"}
            modules = re.findall(r"python -m ((?:stages|benchmarks|docs|pipeline)\.[\w.]+)", text)
            missing |= {module for module in modules if importlib.util.find_spec(module) is None}
    assert missing == set()


@pytest.mark.parametrize("pattern", VALID)
def test_project_files_are_valid(pattern: str) -> None:
    files = [path.as_posix() for path in sorted(PROJECT.glob(pattern))]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", *VALID[pattern], *files]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
