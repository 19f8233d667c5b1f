"""What mkdocs puts into the pages: sections of the repository's own texts, and tables of profiles.

What stands between ``<!-- section FILE "Heading" -->`` and ``<!-- /section -->`` becomes that
section without its heading, between ``intro FILE`` what stands before the second heading, and
between ``crossovers PROFILE`` the thresholds of a shipped profile. So nothing is written twice, and
where the file is read as it is, as on GitHub, a link stands in its place.
"""

from __future__ import annotations

import json
import posixpath
import re
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MARKED = re.compile(
    r'^<!-- (?P<kind>section|intro|crossovers) (?P<source>\S+)(?: "(?P<heading>.+?)")? -->\n'
    r".*?^<!-- /(?P=kind) -->$",
    re.MULTILINE | re.DOTALL,
)


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Called by mkdocs for every page."""
    folder = posixpath.dirname(page.file.src_uri) if page is not None else ""
    markdown = _MARKED.sub(_replaced, markdown)
    return _without_links_out(markdown, posixpath.join("docs", folder))


def _replaced(found: re.Match[str]) -> str:
    if found["kind"] == "section":
        return section(found["source"], found["heading"])
    return intro(found["source"]) if found["kind"] == "intro" else crossovers(found["source"])


def section(file: str, heading: str) -> str:
    """The text under a heading of a file, up to the next heading of its level.

    Links to pages of the site stay links; those to other files become the file's name.

    Raises:
        ValueError: there is no such heading.
    """
    lines = (ROOT / file).read_text().splitlines()
    fenced = False
    level, kept = 0, []
    for line in lines:
        fenced ^= line.startswith("```")
        title = None if fenced else re.match(r"(#+) (.+)", line)
        if level and title and len(title[1]) <= level:
            break
        if level:
            kept.append(line)
        elif title and title[2] == heading:
            level = len(title[1])
    if not level:
        raise ValueError(f"{file} has no heading {heading!r}")
    return _relinked("\n".join(kept), posixpath.dirname(file))


def intro(file: str) -> str:
    """The text between the first heading of a file and the second."""
    text = (ROOT / file).read_text()
    return _relinked(text.split("\n## ")[0].partition("\n")[2], posixpath.dirname(file))


def _without_links_out(markdown: str, folder: str) -> str:
    """A page of the site with the names of files where it links to what is not on the site."""

    def kept_inside(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2].partition("#")[0]))
        return found[0] if path.startswith("docs") else f"{found[1]} (`{path}`)"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", kept_inside, markdown)


def _relinked(markdown: str, folder: str) -> str:

    def relinked(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"https?:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{text}]({path.removeprefix('docs/')})"
        return text if target.startswith("#") or text.strip("`") in path else f"{text} (`{path}`)"

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", relinked, markdown).strip()


#: The rest is what `smartattn show` is for.
SHOWN_HEAD_DIMS = (64, 128)


def crossovers(name: str) -> str:
    """Who is fastest from which length on, by call and padding, as a Markdown table."""
    profile = json.loads((ROOT / "calibration" / "profiles" / f"{name}.json").read_text())
    lines = [
        "| call | head dim | padding | fastest, by key length |",
        "|---|---|---|---|",
    ]
    # By its path: no package is installed where the pages are made.
    words = runpy.run_path(str(ROOT / "src" / "smartattn" / "units.py"))
    for threshold in profile.get("thresholds", []):
        if threshold["dtype"] != "bfloat16" or threshold["head_dim"] not in SHOWN_HEAD_DIMS:
            continue
        padding = words["LAYOUTS"][threshold["layout"]]
        if threshold["causal"] and threshold["layout"] == "padded":
            padding += " on the left"
        call = words["in_words"](threshold["mode"], threshold["causal"], padding)
        winners = [
            f"`{winner['backend']}`"
            if place == 0
            else f"from {winner['from_kv_len']:,} `{winner['backend']}`"
            for place, winner in enumerate(threshold["winners"])
        ]
        lines.append(
            f"| {call} | {threshold['head_dim']} "
            f"| {threshold['padding_share']:.0%} | {', '.join(winners)} |"
        )
    device = profile["device"]["name"]
    return f"{device}, bfloat16, measured {profile['date']}:\n\n" + "\n".join(lines)
