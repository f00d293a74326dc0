"""Labels, titles and captions of any content: what is written stays one table, one file, one page, and executes nothing."""

import csv
import io
import re
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from fakes import at, fake_plan
from test_report import HOSTILE, Parsed, fill, render
from test_tables import GOLDEN, SPEC

from gradexp.report import figures, provenance, tables, writing

pytestmark = pytest.mark.usefixtures("sample_records")

LABELS = [
    "a | b",
    "a \\| b",
    "ends in \\",
    "two\nlines",
    "return\rline \u2028 separator",
    "<script>alert(1)</script>",
    "<!-- gone",
    "` <img src=x onerror=alert(1)>",
    "&lt;b&gt; &#60;i&#62;",
    "=cmd|' /C calc'!A0",
    "+1+cmd|' /C calc'!A0",
    "+ cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "[/x]",
    "[bold]b[/bold] [link=http://x]y[/link]",
    "[brackets first]",
    "*star first",
    ":warning: :smile:",
    "x^2 ~ {y} \\input{z} % $ # _ &",
    "snow ☃, é, ñ, ž, Ω, λ, 中, 😀",
    "bell \x07, escape \x1b[31m, null \x00, delete \x7f",
    "--- | ---",
    "#### no heading",
    HOSTILE,
]


def table(label: str) -> tables.Table:
    """The golden table with a label wherever a spec has one."""
    rows = [{**SPEC["rows"][0], "label": label}, *SPEC["rows"][1:]]
    columns = [{**SPEC["columns"][0], "label": label}, *SPEC["columns"][1:]]
    texts = {"corner": label, "note": label, "title": label.replace("{", "{{").replace("}", "}}")}
    return tables.build({**SPEC, **texts, "rows": rows, "columns": columns}, "cpu", at(GOLDEN, fake_plan))


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_markdown_keeps_its_columns_and_no_html(label: str) -> None:
    made = table(label)
    text = tables.to_markdown(made)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = lines[: len(made.rows) + 2]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in head} == {len(made.columns) + 2}
    prose = re.sub(r"`[^`\n]*`", "", text)
    allowed = {"br", "details", "/details", "summary", "/summary"}
    assert set(re.findall(r"<([/\w!?]+)", prose)) <= allowed
    assert not writing.CONTROL.search(text.replace("\n", ""))


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_csv_comes_back_and_no_text_is_a_formula(label: str) -> None:
    text = tables.to_csv(table(label))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(table(label).numbers)
    shown = writing.one_line(label)
    assert rows[0]["row"].removeprefix("'") == rows[0]["column"].removeprefix("'") == shown
    for row in rows:
        for name in ("row", "column", "metric"):
            assert not row[name].lstrip().startswith(("=", "@"))
            assert not row[name].lstrip().startswith(("+", "-")) or not re.search(r"[(|!=\d]", row[name])
        assert float(row["difference"] or 0) <= 1000  # numbers stay numbers, negative ones too


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_latex_is_ascii_and_every_special_character_is_escaped(label: str) -> None:
    text = tables.to_latex(table(label))
    assert text.isascii()
    commands = r"\\(textbf|textbackslash|textasciicircum\{\}|textasciitilde\{\}|[a-zA-Z]+|[`'^~\"&%$#_{}\\|])"
    row = writing.latex(label)
    bare = re.sub(r"\$[^$]*\$", "", re.sub(commands, "", row))
    assert not re.search(r"[\^~&%#_]", bare), bare
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"\\\\\s*[\[*]", text)


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_terminal_and_picture_show_the_label_itself(label: str) -> None:
    made = table(label)
    assert writing.one_line(label).strip() in tables.to_text(made)
    assert not writing.CONTROL.search(tables.to_text(made).replace("\n", ""))
    root = ElementTree.fromstring(tables.to_svg(made))
    shown = "".join("".join(root.itertext()).replace("\xa0", " ").split())
    first = "".join(writing.one_line(label).split())[:12]
    assert first in shown


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_pages_of_figures_and_claims_keep_their_tables(label: str) -> None:
    caption = provenance.Caption([label], [label])
    text = figures.to_markdown({"number": "1", "title": label}, "cpu", [figures.Series({"label": label}, ())], caption)
    assert not re.search(r"<(?!/?(details|summary))[A-Za-z/!?]", re.sub(r"`[^`\n]*`", "", text))
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 3


def test_the_page_has_no_element_of_a_label(tmp_path: Any) -> None:
    fill(tmp_path)

    def elements(label: str) -> list[str]:
        rows = [SPEC["rows"][0], SPEC["rows"][1] | {"label": label}]
        page = render(tmp_path, spec=SPEC | {"rows": rows, "note": label}, words=label)
        return [name for name, _ in Parsed(page).elements if name not in ("code", "em", "strong")]

    assert elements(" ".join(LABELS)) == elements("x")


def test_numbers_are_no_formulas() -> None:
    frame = pd.DataFrame({"a": [-1.5, 2.0], "b": ["-1.5", "+2"], "c": ["-inf", "nan"], "d": ["+ Score-Matching", "-"]})
    assert writing.csv(frame) == "a,b,c,d\n-1.5,-1.5,-inf,+ Score-Matching\n2.0,+2,nan,'-\n"
