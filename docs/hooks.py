"""What mkdocs does not do by itself: pages that lie outside docs/, references made from the code, and the links between all of them.

Pages keep links that work in the repository, relative to the file that holds them. Every file that a page links to is on the site: a
Markdown file as a page, a picture as it is, any other file as a page that shows it. Links are turned to where things lie there.
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from vlm2vec.cli import parser
from vlm2vec.schema import Recipe, reference

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)#\s]+)")  # up to an anchor; a link into the same page has nothing in front of it
UNNAMED = "Guides"  # the section of pages that `nav` does not name
WIDTH = 100  # of the usage of a command


# ---------------------------------------------------------------------------------------------------------------- where things lie


def site_path(path: str) -> str:
    """The place in the site's sources of a file of the repository: docs/a.md -> a.md, README.md -> index.md, r/x.yaml -> r/x.yaml.md."""
    if path == "README.md":
        return "index.md"
    inner = path.removeprefix("docs/")
    return inner if inner != path or path.endswith(".md") else f"{path}.md"


def linked(path: str) -> Iterator[str]:
    """The files of the repository that a page of the repository links to."""
    for target in LINK.findall((ROOT / path).read_text("utf-8")):
        if "://" not in target and (ROOT / (found := _beside(path, target))).is_file():
            yield found


def reachable() -> list[str]:
    """The pages in docs/, the README, and every file that is linked from one of them."""
    waiting = ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    found = dict.fromkeys(waiting)
    for path in waiting:
        new = [other for other in linked(path) if other not in found] if path.endswith(".md") else []
        found.update(dict.fromkeys(new))
        waiting += new
    return sorted(found)


def turned(markdown: str, path: str) -> str:
    """The text of the page `path` with its links as the site needs them."""
    here = posixpath.dirname(site_path(path)) or "."

    def turn(match: re.Match[str]) -> str:
        away = "://" in match[1]
        return match[0] if away else f"]({posixpath.relpath(site_path(_beside(path, match[1])), here)}"

    return LINK.sub(turn, markdown)


def unescaped(markdown: str) -> str:
    """In the code of a table a bar is escaped for GitHub; here it needs no escape, and the backslash would be seen."""
    return CODE.sub(lambda match: match[0].replace("\\|", "|"), markdown)


def shown(path: str) -> str:
    """A page that shows a file as it is; no result of a search."""
    text = (ROOT / path).read_text("utf-8")
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{Path(path).suffix[1:]}\n{text}\n````\n"


def _beside(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


# ---------------------------------------------------------------------------------------------------------------- references


def recipe_keys() -> str:
    """A table of keys for each section of a recipe, as `vlm2vec keys` lists them."""
    sections = {name: section.metadata["help"] for name, section in Recipe.__dataclass_fields__.items()}
    parts, last = [], None
    for key, kind, default, meaning in reference():
        section = re.split(r"[.\[]", key)[0]
        if section != last:
            title = f"\n## {section}\n\n{sections[section].capitalize()}.\n" if section in sections else ""
            parts.append(f"{title}\n| key | meaning | type and range | default |\n|---|---|---|---|")
        parts.append(f"| `{key}`{{ #{key} }} | {_plain(meaning)} | {kind} | `{default}` |")
        last = section
    return "\n".join(parts)


def commands() -> str:
    """Each command with its help text, arguments and options, as `--help` shows them."""
    return "\n\n".join(_command(name, each) for name, each in _commands(parser(), ""))


def _commands(above: argparse.ArgumentParser, prefix: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in above._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{prefix}{name}", command
                yield from _commands(command, f"{prefix}{name} ")


def _command(name: str, command: argparse.ArgumentParser) -> str:
    level = "##" if " " not in name else "###"
    told = (command.description or "").splitlines()
    style = argparse.HelpFormatter(command.prog, width=WIDTH)
    rows = [row for action in command._actions if (row := _row(style, action))]
    table = ["| argument or option | meaning |", "|---|---|", *rows] if rows else []
    style.add_usage(command.usage, command._actions, command._mutually_exclusive_groups, prefix="")
    return "\n".join([f"{level} vlm2vec {name}", "", *_told(told), "", "```text", style.format_help().rstrip(), "```", "", *table])


def _told(lines: list[str]) -> Iterator[str]:
    """A help text in Markdown: what is indented is code, the rest are paragraphs."""
    before = False
    for line in lines:
        code = line.startswith("  ")
        if code != before:
            yield ""
        yield f"    {line.strip()}" if code else _plain(line)
        before = code


def _row(style: argparse.HelpFormatter, action: argparse.Action) -> str:
    """An argument or option as a row of a table, or "" for what every command has."""
    if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
        return ""
    return f"| `{style._format_action_invocation(action)}` | {_plain(style._expand_help(action))} |"


def _plain(text: str) -> str:
    """Text that Markdown must take as it is, but for code between backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_|\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)


GENERATED: dict[str, Callable[[], str]] = {"<!-- recipe keys -->": recipe_keys, "<!-- commands -->": commands}


# ---------------------------------------------------------------------------------------------------------------- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give pages of docs/ that `nav` does not name a place in it."""
    assert config.nav is not None
    sections = {name: pages for section in config.nav for name, pages in section.items()}
    named = {page for pages in sections.values() if isinstance(pages, list) for entry in pages for page in entry.values()}
    sections[UNNAMED] += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/."""
    for path in reachable():
        if path.startswith("docs/"):
            continue
        if path.endswith(".md"):
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, site_path(path), content=shown(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill generated parts in and turn links; the home page stands alone in its section and needs no list of pages beside it."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    paths = {site_path(path): path for path in reachable()}
    for mark, make in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return unescaped(turned(markdown, paths[page.file.src_uri]))
