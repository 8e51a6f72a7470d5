"""Pages name encoders without the digests of their keys, where nobody is confused."""

from dataclasses import replace

from g2l_core.report.html import page
from g2l_core.report.names import named, short_names
from g2l_core.results import EncoderSummary, Result
from tests.report.test_report import report, result

DIGEST = "b990dbed" + "0" * 56


def with_keys(*keys):
    """A report of encoders with these keys, all of one digest."""
    full = report()
    facts = {"weights": "w", "dim": 2, "pooling": "cls", "precision": "fp32", "digest": DIGEST}
    shown = tuple(EncoderSummary(key=key, name=key.partition("-")[0], **facts) for key in keys)
    rows = tuple(result(encoder=key, settings={"C_chosen_by": "given"}) for key in keys)
    summary = (f"task: 1 for {keys[0]}.",)
    notes = (f"task task: 3 slides were used to distill {keys[0]}: a", f"store: {keys[0]} was imported")
    return replace(full, encoders=shown, results=rows, comparisons=(), failures=(), summary=summary, notes=notes)


def test_a_digest_at_the_end_of_a_key_is_left_out():
    shown = named(with_keys("run1-b990dbed", "uni"))
    assert [row.encoder for row in shown.results if isinstance(row, Result)] == ["run1", "uni"]
    assert shown.summary == ("task: 1 for run1.",)
    assert shown.notes == ("task task: 3 slides were used to distill run1: a", "store: run1 was imported")
    text = page(with_keys("run1-b990dbed", "uni"))
    assert "run1-b990dbed" not in text
    assert "C_chosen_by" not in text
    assert "C chosen by" in text
    assert DIGEST[:12] in text


def test_it_stays_where_names_would_be_the_same_or_it_is_no_digest():
    assert short_names(with_keys("run-b990dbed", "run"))["run-b990dbed"] == "run-b990dbed"
    assert short_names(with_keys("run-00000000"))["run-00000000"] == "run-00000000"
