"""Text that is safe to write, whatever labels and captions contain; Markdown and files of the report."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import rich.box
import rich.console
import rich.table
from markupsafe import Markup, escape

from gradexp.base.files import write_atomically

PAGES = Path(__file__).with_name("page")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*(e[+-]?\d+)?|nan|inf)")
SIGNED_WORDS = re.compile(r"[+-] [\w ,.-]*")  # such as `+ Score-Matching`, which calls nothing


def one_line(text: str) -> str:
    """The text with a space for every line break and control character."""
    return CONTROL.sub(" ", text)


def plain(text: str) -> str:
    """The text for Markdown, on one line, with HTML escaped; `code` and other marks of Markdown remain."""
    parts = re.split(r"(`[^`]*`)", one_line(text))
    return "".join(part if number % 2 else _without_html(part) for number, part in enumerate(parts))


def _without_html(text: str) -> str:
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


LATEX = str.maketrans(
    {"×": r"$\times$", "→": r"$\rightarrow$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$", "±": r"$\pm$", "–": "--"}
    | {"½": r"$\frac{1}{2}$", "∇": r"$\nabla$", "‖": r"$\|$", "²": "$^2$", "³": "$^3$", "§": r"\S ", "ℓ": r"$\ell$"}
    | {"·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "∞": r"$\infty$", "…": r"\ldots{}", "—": "---"}
    | {"’": "'", "‘": "`", "“": "``", "”": "''"}
    | {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash ", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
)
GREEK = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"  # those that LaTeX has by name
ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"'}
ACCENTS |= {"\u030a": "r ", "\u030c": "v ", "\u0327": "c "}


def latex(text: str) -> str:
    """The text in ASCII that LaTeX sets as it reads; `[U+2603]` for a character that is neither a letter nor in LATEX."""
    escaped = "".join(map(_latex, one_line(text).translate(LATEX)))
    # After the end of a row, \\, these two would be read as its options.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped.startswith(("[", "*")) else escaped


def _latex(character: str) -> str:
    if character.isascii():
        return character
    if character in GREEK:
        name = unicodedata.name(character).replace("LAMDA", "LAMBDA").rpartition(" ")[2]
        return rf"$\{name.lower() if character.islower() else name.capitalize()}$"
    base, accent = (*unicodedata.normalize("NFD", character), "")[:2]
    if base.isascii() and accent in ACCENTS:
        return rf"\{ACCENTS[accent]}{{{base}}}"
    return f"[U+{ord(character):04X}]"


def csv(frame: pd.DataFrame) -> str:
    """A CSV file without index, whose text no spreadsheet takes for a formula; numbers are not changed."""
    return frame.rename(columns=_no_formula).map(_no_formula).to_csv(index=False)


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    formula = text.lstrip().startswith(("=", "+", "-", "@")) and not (NUMBER.fullmatch(text) or SIGNED_WORDS.fullmatch(text))
    return f"'{text}" if formula else text


def rendered(name: str, **content: Any) -> str:
    """A template of page/, filled. A name that is missing is an error."""
    return _environment().get_template(name).render(**content)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=jinja2.select_autoescape(["html", "svg"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    filters = (one_line, plain, latex, line, cell_of_line, prose, quantity)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def line(cells: Iterable[Any]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell_of_line(str(cell)) for cell in cells)} |"


def table_lines(head: Sequence[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def cell_of_line(text: str) -> str:
    """The text on one line, with `|` escaped, and with it the backslashes before it."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line(text))


@jinja2.pass_context
def prose(context: jinja2.runtime.Context, text: str) -> Markup:
    """A line of Markdown as HTML, with `code`, strong and emphasised words; runs among the page's `records` become links."""
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text.removeprefix("- "))))
    marked = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
    marked = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", marked)
    known = {record["id"] for record in context["records"]}
    link = r'<a href="#run-\1">run<span class="hash"> \1</span></a>'
    return Markup(re.sub("run ([0-9a-f]{12})", lambda run: run.expand(link) if run[1] in known else run[0], marked))


def quantity(value: Any) -> str:
    """A measured number with three digits; other values unchanged."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def printed(frame: pd.DataFrame) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    table, screen = rich.table.Table(box=rich.box.HORIZONTALS), io.StringIO()
    for number, name in enumerate(frame.columns):
        table.add_column(name, justify="right" if number else "left")
    for line in frame.itertuples(index=False):
        table.add_row(*line)
    # Wide enough that no cell is broken; without colours, also if the environment asks for them.
    options: Any = {"markup": False, "emoji": False, "force_terminal": False}
    rich.console.Console(width=1000, file=screen, **options).print(table)
    return "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())


def stem_of(kind: str, number: str, scale: str, results: Path) -> Path:
    """The path of a table's or figure's files without their suffix, such as results/tables/cpu/table_2_1."""
    return results / f"{kind}s" / scale / f"{kind}_{number.replace('.', '_')}"


def write_beside(stem: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Write {suffix: content} as stem.suffix. The stem's name may contain dots."""
    files = {stem.parent / f"{stem.name}.{kind}": content for kind, content in contents.items()}
    for file, content in files.items():
        write_atomically(file, content if isinstance(content, bytes) else content.encode())
    return list(files)
