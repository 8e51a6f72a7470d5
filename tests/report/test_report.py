"""Reports: the round trip, the bytes, the tables by hand, and a page that is well formed and lets nothing through."""

import csv
import json
import math
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import RunError, TaskError
from g2l_core.report import write as module
from g2l_core.report.html import page
from g2l_core.report.json import json_text
from g2l_core.report.meanings import METRICS
from g2l_core.report.tables import (
    best,
    decimals,
    estimate_text,
    few_patients,
    meaning_of,
    number,
    p_text,
    split_k,
    task_parts,
)
from g2l_core.report.write import read_report, terminal_table, write_report
from g2l_core.results import (
    CkaMatrix,
    Comparison,
    ConfusionMatrix,
    EncoderSummary,
    Estimate,
    Failure,
    Plots,
    Projection,
    PublishedValue,
    Report,
    Result,
    SlideMap,
)

FILES = ["results.json", "results.csv", "comparisons.csv", "results.md", "report.html"]
NASTY = "<script>alert('x')</script> & \"q\" | `c` *b* [l](u)"


def estimate(value, half=math.nan):
    return Estimate(value=value, low=value - half, high=value + half, method="bootstrap over 8 patients, 1,000 draws")


def result(task="oral", metric="knn_accuracy", encoder="teacher", value=0.7, half=0.04, **more):
    return Result(task=task, metric=metric, encoder=encoder, estimate=estimate(value, half), n=100, **more)


def facts(key="teacher", **more):
    told = {"name": key.title(), "weights": "random, seed 0", "dim": 64, "pooling": "cls", "precision": "fp32"}
    return EncoderSummary(**{"key": key, "digest": "0123456789abcdef" * 4, **told, **more})


def report(**more):
    empty = {"summary": (), "encoders": (), "results": (), "comparisons": (), "failures": (), "provenance": {}}
    return Report(**{"title": "A run", **empty, **more})


@pytest.fixture
def full():
    """Two tasks; three encoders; curves, forests, differences, an untrained student and a failure."""
    values = {"teacher": 0.87, "before": 0.70, "after": 0.86}
    metrics = ["knn_accuracy", "robustness_ratio_k3", "robustness_ratio_k10", "my_own"]
    return report(
        summary=("The student is 0.01 below its teacher.",),
        encoders=(facts("teacher"), facts("before", note="untrained"), facts("after")),
        results=tuple(
            result(task=task, metric=metric, encoder=key, value=value, settings={"k": 3, "split": "fixed"})
            for task in ("oral", "breast")
            for metric in metrics
            for key, value in values.items()
            if (task, key, metric) != ("breast", "before", "knn_accuracy")
        ),
        comparisons=(
            Comparison(
                task="oral",
                metric="knn_accuracy",
                encoder="after",
                reference="teacher",
                difference=estimate(-0.01, 0.02),
                p_value=0.321,
                p_holm=0.642,
                tests=2,
            ),
        ),
        failures=(Failure(task="breast", encoder="before", reason="no probe converged"),),
        provenance={"command": "g2l bench a.toml", "g2l": "0.1.0"},
        notes=("3 slides of oral were distilled on.",),
        expected=(
            PublishedValue(
                task="oral", metric="knn_accuracy", encoder="Teacher", value=0.86, tolerance=0.01, source="Table 2"
            ),
        ),
        pictures=Plots(cka=(cka(),), projections=(projection(),), slides=(slide_map(),), confusions=(confusion(),)),
    )


def cka(**more):
    values = ((1.0, 0.25), (0.25, math.nan))
    return CkaMatrix(
        **{"task": "oral", "encoders": ("teacher", "after"), "values": values, "rows": "test", "n": 9, "of": 40, **more}
    )


def projection(**more):
    told = {"task": "oral", "encoder": "teacher", "method": "PCA", "shares": (0.5, 0.25), "of": 300}
    places = {"x": (0.0, -1.0, 0.5), "y": (0.0, 0.5, -1.0)}
    names = {"classes": ("benign", "tumor"), "class_of": (0, 1, 1), "centers": ("north",), "center_of": (0, 0, 0)}
    return Projection(**{**told, **places, **names, **more})


def slide_map(**more):
    cells = {"columns": (0, 1, 0), "rows": (0, 0, 1), "colors": ("f00", "0f0", "f00")}
    return SlideMap(
        **{"task": "oral", "encoder": "teacher", "slide": "a/s1", "cell_mm": 0.128, "patches": 3, **cells, **more}
    )


def confusion(**more):
    told = {"task": "oral", "classifier": "knn", "encoder": "teacher", "classes": ("benign", "tumor")}
    return ConfusionMatrix(**{**told, "counts": ((3, 1), (0, 4)), "settings": {"k": 20}, **more})


def spelled(value):
    """The value with its types, and NaN equal to NaN: what identity means for a report."""
    if is_dataclass(value):
        return type(value).__name__, {f.name: spelled(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(spelled, value))
    return type(value).__name__, repr(value)


texts = st.text(max_size=12)
floats = st.floats() | st.sampled_from([0.1, -0.0, 1.0, math.nan, math.inf, -math.inf])
settings_values = st.booleans() | st.integers() | floats | texts.filter(lambda s: s not in ("Infinity", "-Infinity"))
estimates = st.builds(Estimate, value=floats, low=floats, high=floats, method=texts)
encoders = st.builds(EncoderSummary, **dict.fromkeys(["key", "name", "note"], texts))
metrics = texts | st.sampled_from(["robustness_ratio_k3", "robustness_ratio_k5", "knn_accuracy"])
settings = st.dictionaries(texts, settings_values, max_size=3)
places = st.tuples(texts, metrics, texts)
# Records that hold containers are built in the tests: the run-time checks of their types draw random items.
figures = st.dictionaries(
    places, st.tuples(estimates, st.integers(0), settings, st.sampled_from(["higher", "lower", "neither"])), max_size=6
)
records = st.fixed_dictionaries(
    {
        "title": texts,
        "summary": st.lists(texts, max_size=2).map(tuple),
        "encoders": st.lists(encoders, max_size=2).map(tuple),
        "results": figures,
        "comparisons": st.lists(st.builds(Comparison, difference=estimates, p_value=floats), max_size=2).map(tuple),
        "failures": st.lists(st.builds(Failure, encoder=texts), max_size=2).map(tuple),
        "provenance": st.dictionaries(texts, texts, max_size=2),
        "notes": st.lists(texts, max_size=2).map(tuple),
        "expected": st.lists(
            st.builds(PublishedValue, metric=metrics, value=floats, tolerance=floats, source=texts), max_size=2
        ).map(tuple),
        "pictures": st.tuples(texts, texts, floats, floats, st.booleans()),
    }
)


def built(record):
    results = tuple(
        Result(task=task, metric=metric, encoder=key, estimate=value, n=n, settings=told, better=better)
        for (task, metric, key), (value, n, told, better) in record["results"].items()
    )
    return Report(**{**record, "results": results, "pictures": drawn(*record["pictures"])})


def drawn(task, name, one, other, is_empty):
    """Pictures of any names and numbers, or none."""
    if is_empty:
        return Plots()
    return Plots(
        cka=(cka(task=task, encoders=(name, f"{name}2"), values=((one, other), (other, one))),),
        projections=(
            projection(task=task, encoder=name, x=(one, other, 0.5), classes=("", name), shares=()),
            projection(task=task, encoder=name, method=name, classes=("",), class_of=(0, 0, 0), centers=("",)),
        ),
        slides=(slide_map(task=task, slide=name, cell_mm=one),),
        confusions=(confusion(task=task, classifier=name, counts=((0, 0), (1, 2)), settings={name: other}),),
    )


@given(records)
def test_what_is_written_is_read_back(tmp_path_factory, record):
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.json").write_text(json_text(built(record)), encoding="utf-8")
    assert spelled(read_report(folder)) == spelled(built(record))


def test_all_files_are_written_and_nothing_else(full, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert write_report(full, folder) == [folder / name for name in FILES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_equal_reports_give_equal_bytes_whatever_the_order_of_keys(full, tmp_path):
    turned = replace(
        full,
        provenance=dict(reversed(full.provenance.items())),
        results=tuple(replace(row, settings=dict(reversed(row.settings.items()))) for row in full.results),
    )
    write_report(full, tmp_path / "a")
    write_report(turned, tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_json_is_strict_sorted_and_ends_with_a_newline(tmp_path):
    rows = (result(value=math.inf), result(encoder="b", value=0.1 + 0.2))
    write_report(report(results=rows), tmp_path)
    text = (tmp_path / "results.json").read_text()

    def refuse(word):
        raise AssertionError(word)

    raw = json.loads(text, parse_constant=refuse)
    assert text.endswith("}\n")
    assert "0.30000000000000004" in text
    assert raw["results"][0]["estimate"]["value"] == "Infinity"
    assert raw["results"][0]["estimate"]["low"] == "Infinity"
    assert list(raw) == sorted(raw)
    assert list(raw["results"][0]) == sorted(raw["results"][0])


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_nan_is_null_in_json_and_empty_in_csv(tmp_path):
    write_report(report(results=(result(half=math.nan),)), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["estimate"]["low"] is None
    [row] = rows_of(tmp_path / "results.csv")
    assert (row["value"], row["low"], row["high"]) == ("0.7", "", "")


def test_csv_holds_every_figure_exactly(full, tmp_path):
    rows = (*full.results, result(task='a,"b"\nc', value=1 / 3, settings={"C": 0.1}))
    write_report(replace(full, results=rows), tmp_path)
    read = rows_of(tmp_path / "results.csv")
    assert [row["task"] for row in read] == [row.task for row in rows]
    assert [float(row["value"]) for row in read] == [row.estimate.value for row in rows]
    assert [row["settings.C"] for row in read] == [""] * len(full.results) + ["0.1"]
    assert read[0]["settings.k"] == "3"
    [difference] = rows_of(tmp_path / "comparisons.csv")
    assert (difference["difference"], difference["p_value"]) == ("-0.01", "0.321")
    assert (difference["p_holm"], difference["tests"]) == ("0.642", "2")
    assert (difference["encoder"], difference["reference"]) == ("after", "teacher")


def test_a_failed_write_leaves_the_former_report(full, tmp_path, monkeypatch):
    write_report(full, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    opened = module.Path.open

    def full_disk(path, *args, **kwargs):
        if "report.html" in path.name:
            raise OSError(28, "No space left on device")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(module.Path, "open", full_disk)
    with pytest.raises(RunError, match="No space left"):
        write_report(replace(full, title="Another"), tmp_path)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_in_the_middle_of_the_former_report_is_not_disturbed(full, tmp_path):
    write_report(full, tmp_path)
    before = (tmp_path / "results.json").read_text()
    with (tmp_path / "results.json").open() as reader:
        start = reader.read(10)
        write_report(replace(full, title="Another"), tmp_path)
        assert start + reader.read() == before
    assert read_report(tmp_path).title == "Another"


def test_a_folder_that_is_a_file_is_refused(full, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="cannot be written into .*out"):
        write_report(full, tmp_path / "out")


BARE = '{"format": 1, "title": "t", "summary": [], "encoders": [], "results": [], "comparisons": [], "failures": [], '
BARE += '"provenance": {}}'


def test_a_report_without_pictures_is_read(tmp_path):
    (tmp_path / "results.json").write_text(BARE)
    assert read_report(tmp_path) == report(title="t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no report can be read"),
        ("{", "is not JSON"),
        ("[]", "should be of format 1, is None"),
        ('{"format": 2}', "should be of format 1, is 2"),
        ('{"format": 1}', "is not a report"),
        ('{"format": 1, "title": "", "summary": [], "encoders": [{"color": 1}]}', "is not a report"),
        (BARE.replace("}}", '}, "pictures": {"cka": [{}]}}'), "is not a report"),
    ],
)
def test_what_is_not_a_report_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_report(tmp_path)


def test_two_figures_in_one_place_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TaskError, match=r"'oral' has two figures 'knn_accuracy' of encoder 'teacher'"):
        write_report(report(results=(result(), result(value=0.2))), tmp_path)
    assert not list(tmp_path.iterdir())


# Text


def test_terminal_table_drawn_by_hand():
    rows = [
        result(metric="knn_accuracy", encoder="teacher", value=0.71, half=0.04),
        result(metric="knn_accuracy", encoder="student", value=0.6, half=0.05),
        result(metric="robustness_ratio_k5", encoder="student", value=1.3, half=0.2),
        result(task="breast", metric="cka_debiased", encoder="student", value=0.5, half=math.nan),
    ]
    assert terminal_table(rows).splitlines() == [
        "oral",
        "robustness: kNN accuracy beside it: teacher 0.710, student 0.600 (-0.110)",
        "                       teacher            student",
        "kNN accuracy           0.71 [0.67, 0.75]  0.60 [0.55, 0.65]",
        "Robustness ratio, k=5  -                  1.30 [1.10, 1.50]",
        "",
        "breast",
        "               student",
        "CKA, debiased  0.500",
    ]


def test_terminal_table_tells_cautions_and_failures(full):
    text = terminal_table(full)
    assert "before: untrained" in text
    assert "not evaluated: breast, before: no probe converged" in text
    [row] = [line for line in text.split("\nbreast\n")[1].splitlines() if line.startswith("kNN")]
    assert re.split(r"\s{2,}", row) == ["kNN accuracy", "0.87 [0.83, 0.91]", "failed", "0.86 [0.82, 0.90]"]


def test_terminal_table_begins_with_the_notes(full):
    plain = terminal_table(replace(full, notes=()))
    assert terminal_table(full) == f"note: {full.notes[0]}\n\n{plain}"


def test_terminal_table_hides_control_characters():
    assert "\x1b" not in terminal_table([result(task="a\x1b[31mb", encoder="\x1b[2Jc")])


@given(
    st.integers(45, 120),
    st.integers(1, 7),
    st.lists(st.floats(-9, 9), min_size=7, max_size=7),
    st.text(st.characters(codec="ascii", categories=["L", "N", "Pd"]), min_size=1, max_size=60),
)
def test_terminal_table_keeps_to_its_width_and_cuts_no_figure(width, count, values, name):
    rows = [result(metric=name, encoder=f"{name}-{i}", value=values[i]) for i in range(count)]
    text = terminal_table(rows, width=width)
    assert max(map(len, text.splitlines())) <= width
    digits = decimals(row.estimate for row in rows)
    shown = re.findall(r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]", text)
    assert [entry for entry in shown if entry in {estimate_text(row.estimate, digits) for row in rows}] == [
        estimate_text(row.estimate, digits) for row in rows
    ]


def test_markdown_by_hand(full, tmp_path):
    write_report(full, tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    about = "| kNN accuracy | n = 100; k = 3; split: fixed |"
    assert f"{about} 0.870 [0.830, 0.910] | 0.700 [0.660, 0.740] | 0.860 [0.820, 0.900] |" in lines
    assert f"{about} 0.870 [0.830, 0.910] | failed | 0.860 [0.820, 0.900] |" in lines
    assert "| kNN accuracy | after - teacher | -0.010 [-0.030, +0.010] | p = 0.321 | p = 0.642 over 2 |  |" in lines
    assert "| breast | before | no probe converged |" in lines
    assert "- 3 slides of oral were distilled on." in lines
    assert "| kNN accuracy | Teacher | 0.870 [0.830, 0.910] | 0.86 \u00b1 0.01 | within | Table 2 |" in lines
    assert "| teacher | 1.00 | 0.25 |" in lines
    assert "| benign | 3 | 1 |" in lines
    overview = "| oral | kNN accuracy | n = 100; k = 3; split: fixed | 0.870 [0.830, 0.910] | 0.700 [0.660, 0.740] |"
    assert f"{overview} 0.860 [0.820, 0.900] |" in lines


def test_markdown_rows_keep_their_columns_whatever_the_names(full, tmp_path):
    rows = tuple(replace(row, encoder=f"{row.encoder}{NASTY}\n") for row in full.results)
    write_report(replace(full, title=NASTY, results=rows), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "<script>" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1


@pytest.mark.parametrize(
    ("halves", "values", "spare", "expected"),
    [
        ([0.045], [0.7], 0, 2),
        ([0.045], [0.7], 1, 3),
        ([0.2, 0.004], [0.7, 0.9], 0, 3),
        ([0.3], [1.5], 0, 2),
        ([15.0], [512.0], 0, 0),
        ([1e-9], [0.5], 0, 5),
        ([math.nan], [0.5], 1, 3),
        ([math.nan], [500.0], 0, 1),
        ([0.0], [0.5], 0, 3),
    ],
)
def test_decimals_follow_the_narrowest_interval(halves, values, spare, expected):
    pairs = zip(values, halves, strict=True)
    assert decimals((estimate(value, half) for value, half in pairs), spare) == expected


def test_numbers_as_text():
    assert number(-0.0004, 2) == "0.00"
    assert number(0.25, 1, "+") == "+0.2"
    assert number(-3e12, 2) == "-3e+12"
    assert estimate_text(estimate(math.nan), 2) == "n/a"
    assert [p_text(p) for p in (0.0004, 0.0429, math.nan)] == ["p < 0.001", "p = 0.043", ""]


def test_metrics_are_named_by_their_beginning():
    assert meaning_of("knn_balanced_accuracy").title == "kNN balanced accuracy"
    assert meaning_of("knn_accuracy_k20").title == "kNN accuracy, k=20"
    assert meaning_of("cka_debiased_projected").title == "CKA, debiased, projected"
    assert meaning_of("knn_accuracyx").title == "knn_accuracyx"
    assert meaning_of("robustness_ratio_k5").neutral == 1.0
    assert all(meaning_of(name) == meaning for name, meaning in METRICS.items())
    assert all(meaning_of(name).sentence.endswith(".") for name in METRICS)
    assert split_k("robustness_ratio_k05") == ("robustness_ratio_k05", None)


def test_figures_stand_in_the_order_of_the_encoder_that_has_most():
    rows = [("teacher", "rank"), ("teacher", "knn"), ("a", "cka"), ("a", "rank"), ("a", "knn"), ("b", "more")]
    shown = task_parts(report(results=tuple(result(encoder=key, metric=metric) for key, metric in rows)))
    assert list(shown[0].results) == ["cka", "rank", "knn", "more"]


def led(better, *differences):
    """Which of a (1), b (2) and c (3) leads, given sure or unsure differences."""
    row = {
        key: result(encoder=key, value=value, better=better) for key, value in {"a": 1.0, "b": 2.0, "c": 3.0}.items()
    }
    comparisons = tuple(
        Comparison(
            task="oral",
            metric="knn_accuracy",
            encoder=pair[0],
            reference=pair[1],
            difference=estimate(0.5, half),
            p_value=0.001,
            p_holm=p_holm,
        )
        for pair, half, p_holm in differences
    )
    (part,) = task_parts(report(results=tuple(row.values()), comparisons=comparisons))
    return best(part, part.results["knn_accuracy"])


def test_only_a_value_that_is_surely_ahead_of_all_others_leads():
    sure = [("ca", 0.1, 0.01), ("bc", 0.1, 0.01), ("ba", 0.1, 0.01)]
    assert led("higher", *sure) == {"c"}
    assert led("lower", *sure) == {"a"}
    assert led("neither", *sure) == frozenset()
    assert led("higher", sure[0]) == frozenset()  # not compared with b
    assert led("higher", sure[0], ("bc", 0.6, 0.01)) == frozenset()  # the interval holds 0
    assert led("higher", sure[0], ("bc", 0.1, 0.06)) == frozenset()  # not after adjustment


@pytest.mark.parametrize(
    ("clusters", "words"),
    [(0, ""), (3, "too few for an interval"), (5, "no difference can reach"), (6, "nearly all show"), (10, "")],
)
def test_few_patients_are_said_to_be_few(clusters, words):
    value = replace(estimate(0.5, 0.1), clusters=clusters, unit="patients")
    (part,) = task_parts(report(results=(replace(result(), estimate=value),)))
    assert words in few_patients(part)
    assert bool(few_patients(part)) == bool(words)


def test_parts_keep_the_order_of_the_report():
    rows = (result(task="z", encoder="late"), result(task="a"), result(task="z", encoder="early"))
    parts = task_parts(report(encoders=(facts("early"), facts("unused")), results=rows))
    assert [(part.name, part.encoders) for part in parts] == [("z", ("early", "late")), ("a", ("teacher",))]


# The page


class Reader(HTMLParser):
    """Keeps the tags and texts, and checks that every element is closed in its turn."""

    VOID = ("meta", "!doctype", "wbr")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_page(given_report):
    reader = Reader()
    reader.feed(page(given_report))
    reader.close()
    assert not reader.open
    return reader


@given(records)
def test_the_page_is_well_formed_whatever_the_report(record):
    reader = read_page(built(record))
    assert {tag for tag, _ in reader.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section", "h1", "h2", "h3", "p"),
        *("a", "div", "ul", "li", "b", "table", "thead", "tbody", "tr", "th", "td", "span", "code", "dl", "dt", "dd"),
        *("figure", "figcaption", "details", "summary", "svg", "path", "text", "g"),
    }


def test_the_page_needs_nothing_from_outside_and_runs_nothing(full):
    text = page(full)
    for tag, attributes in read_page(full).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text


def nasty(value):
    """The same report with every text replaced by one that would run, break out of an attribute or a table."""
    if is_dataclass(value):
        texts = (f.name for f in fields(value) if f.name != "better")  # one of three words
        return replace(value, **{name: nasty(getattr(value, name)) for name in texts})
    if isinstance(value, dict):
        return {key + NASTY: nasty(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(nasty, value))
    return value + NASTY if isinstance(value, str) else value


def test_every_text_is_escaped_and_shown(full):
    bad = nasty(full)
    reader = read_page(bad)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert "<script" not in page(bad)
    shown = "".join(reader.texts) + "".join(str(v) for _, attributes in reader.tags for v in attributes.values())
    told = [bad.title, *bad.summary, bad.failures[0].reason, *bad.provenance, *bad.provenance.values()]
    told += [bad.results[0].task, bad.results[0].encoder, bad.results[0].metric, bad.results[0].estimate.method]
    told += [*bad.notes, bad.expected[0].encoder, bad.expected[0].source, bad.pictures.slides[0].slide]
    told += [*bad.pictures.projections[0].classes, *bad.pictures.confusions[0].classes, bad.pictures.cka[0].encoders[1]]
    told += [getattr(row, name) for row in bad.encoders for name in ("key", "name", "weights", "digest", "pooling")]
    for text in told:
        assert text in shown


def test_the_page_shows_cautions_failures_and_digests(full):
    reader = read_page(full)
    assert ("code", {"title": full.encoders[0].digest}) in reader.tags
    assert full.encoders[0].digest[:12] in reader.texts
    assert reader.texts.count("untrained") == 3  # the encoders' table and both tasks'
    assert "failed" in reader.texts
    assert "Not evaluated" in reader.texts
    assert "Not evaluated" not in read_page(replace(full, failures=())).texts


def pictures(text, kind):
    found = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="plot".*?</svg>', text)]
    return [svg for svg in found if svg.get("aria-label").startswith(kind)]


def test_each_picture_holds_each_figure_once(full):
    text = page(full)
    curve = pictures(text, "Robustness ratio over k")
    forests = pictures(text, "Metrics of oral")
    assert len(curve) == 2
    assert len(forests) == 2  # kNN accuracy, and the unknown metric on an axis of its own
    assert len(pictures(text, "Differences from teacher")) == 1
    bars = [p for p in curve[0].iter("path") if p.get("class", "").startswith("bar")]
    assert len(bars) == 6  # two k of three encoders
    assert [len([p for p in svg.iter("path") if p.get("class", "").startswith("bar")]) for svg in forests] == [3, 3]
