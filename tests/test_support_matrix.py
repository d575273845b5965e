"""The support page: what a report says is what the page says, and the page in docs is of these classes."""

import re

import pytest
import transformers
from families import cases
from support_matrix import COLUMNS, PAGE, cell, page, rows_of

REPORT = """\
<testsuites><testsuite>
<testcase name="a">{a}</testcase>
<testcase name="b">{b}<failure message="off by 2e-5"/></testcase>
<testcase name="c">{c}<skipped type="pytest.xfail" message="it has a bias"/></testcase>
<testcase name="d">{d}<skipped type="pytest.skip" message="no layers to checkpoint"/></testcase>
<testcase name="e">{e}</testcase>
<testcase name="f">{f}</testcase>
<testcase name="g">{g}<error message="no such file"/></testcase>
<testcase name="says nothing"/>
</testsuite></testsuites>
"""


def recorded(column, family="toy", experts="ToyExperts", **says):
    """The properties of a test that fills a cell, as pytest writes them."""
    said = []
    cell(lambda *pair: said.append(pair), column, family, experts, **says)
    lines = [f'<property name="{name}" value="{value}"/>' for name, value in said]
    return f"<properties>{''.join(lines)}</properties>"


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "report.xml").write_text(
        REPORT.format(
            a=recorded("full", model="ToyForCausalLM", activation="swiglu"),
            b=recorded("LoRA"),
            c=recorded("export"),
            d=recorded("checkpointing"),
            e=recorded("compile"),
            f=recorded("tensor parallel", experts=""),
            g=recorded("compile"),
        )
    )
    return rows_of(tmp_path / "report.xml")


def test_a_cell_is_the_worst_outcome_of_its_tests(rows):
    (row,) = rows.values()
    assert {column: row.cell(column) for column in COLUMNS} == {
        "full": "yes",
        "LoRA": "FAILS",
        "checkpointing": "n/a",
        "compile": "FAILS",
        "export": "refused",
        "tensor parallel": "yes",
        "expert parallel": "not run",
        "FSDP2": "not run",
    }


def test_the_page_has_a_line_for_each_class_and_the_reasons(rows):
    drawn = page(rows)
    cells = "yes | FAILS | n/a | FAILS | refused | not run | yes | not run"
    assert f"| toy | `ToyForCausalLM` | `ToyExperts` | swiglu | {cells} |" in drawn
    assert "- `ToyExperts`: it has a bias" in drawn
    assert "1 classes: full 1, LoRA 0," in drawn


def test_an_unknown_column_is_an_error():
    with pytest.raises(ValueError, match="is none of"):
        recorded("fulll")


def test_the_page_in_docs_has_every_class_and_no_failure():
    text = PAGE.read_text(encoding="utf-8")
    (drawn_with,) = re.findall(r"transformers (\S+), PEFT", text)
    if drawn_with != transformers.__version__:
        pytest.skip(f"docs/support.md is of transformers {drawn_with}, this is {transformers.__version__}")
    listed = re.findall(r"^\| (\w+) \| `\w+` \| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted((case.family, case.experts) for case in cases())
    assert "FAILS" not in text
