"""What the documents tell people to type: the command line takes it, and what a how-to says works."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tifffile

from g2l_core.store.features import FeatureStore
from tests.conftest import TEACHER
from tests.documents import NEEDS, ROOT, commands, g2l_commands, parse, shell_blocks
from tests.pipeline.test_cli import KEY, g2l

PAGES = sorted([*(ROOT / "docs").glob("**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
_RUN = ("interchange", "predicting", "quickstart", "studies")
RUN = {ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _RUN), *(ROOT / "docs" / "howto").glob("*.md")}
"""Pages whose commands a test runs."""
HOW_TO = sorted((ROOT / "docs" / "howto").glob("*.md"))


def write_files(page):
    """Write the files that a page shows, into this folder: those of blocks that begin with their name."""
    text = page.read_text(encoding="utf-8")
    for kind in ("toml", "text", "python"):
        for block in re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL):
            if found := re.match(r"# (\w+\.(?:toml|py))\b", block):
                Path(found[1]).write_text(block + SMALLER.get(found[1], ""), encoding="utf-8")


def test_every_command_in_the_documents_is_one_of_g2l(tmp_path, monkeypatch):
    taken = 0
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        write_files(page)
        for block in shell_blocks(page):
            for arguments in g2l_commands(block.text):
                if "..." not in arguments:
                    try:
                        parse(arguments)
                    except ValueError as refusal:
                        pytest.fail(f"{block.page}: g2l {' '.join(arguments)}: {refusal}")
                    taken += 1
    assert taken > 100


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("stor ls s.zarr", "No such command 'stor'"),
        ("store ls", "Missing argument 'store'"),
        ("plan --teacher", "requires an argument"),
        ("embed a --store s --encoder e --speed 3", "No such option: --speed"),
        ("bench t --store s --encoders e --out r --draws 3", "greater than or equal to 100"),
    ],
)
def test_what_the_command_line_would_refuse_is_not_taken(wrong, words):
    with pytest.raises(ValueError, match=words):
        parse(wrong.split())


def test_scripts_are_taken_apart_as_the_shell_does():
    loop = 'a=1 b="x y"\nfor i in 1; do\n  g2l one "$b" --n ${a} \\\n --last | tee log\ndone # g2l no\n'
    script = loop + "time g2l two && g2l three"
    assert list(g2l_commands(script)) == [["one", "x y", "--n", "1", "--last"], ["two"], ["three"]]
    assert ["done"] not in list(commands(script))


@pytest.fixture
def place(cohort, cached_store, tmp_path, monkeypatch):
    """A folder as the pages assume it: slides/ with two of the six in s.zarr, moved/ with all, slides.csv, and ssd/."""
    shutil.copytree(cohort.parent / "slides", tmp_path / "moved")
    (tmp_path / "slides").mkdir()
    for name in ("p01-1.tiff", "p02-1.tiff"):
        shutil.copy(tmp_path / "moved" / name, tmp_path / "slides")
    shutil.copy(cohort, tmp_path / "slides.csv")
    shutil.copytree(cached_store, tmp_path / "s.zarr")
    (tmp_path / "ssd").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


STUDY = f"""
[slides]
inputs = ["slides/"]

[teacher]
teacher = "{TEACHER}"
weights = "random:0"
views = 1

[student]
student = "timm:mobilenetv3_small_075@64"
weights = "random:1"
steps = 2
batch_size = 8
"""
KEY_1 = KEY.replace("random0", "random1")

SMALLER = {"mil.toml": "abmil_most_epochs = 2\nabmil_width = 8\n"}
"""Lines that are added to a page's file, so that tests are quick."""


def small(words):
    """A command on the tests' small networks in place of the published ones."""
    command = words[0]
    makes = command in {"cache-teacher", "plan"}
    teacher, student = TEACHER if makes else KEY, KEY_1 if command == "bench" else TEACHER
    known = {"h-optimus-0": teacher, "efficientnet-lite0@128": teacher, "hibou-l": student}
    out = [",".join(known.get(part, part.replace("h-optimus-0=", f"{KEY}=")) for part in w.split(",")) for w in words]
    if makes and TEACHER in out:
        out += ["--weights", "random:0"]
    if command == "embed" and TEACHER in out:
        out += ["--weights", f"{TEACHER}=random:1"]
    if command == "store" and words[1] == "publish":
        out += ["--encoder-license", f"{KEY}=Apache-2.0"]
    if command == "distill":
        out += ["--weights", "random:1", "--steps", "2", "--batch-size", "8", "--device", "cpu"]
    return out


def play(page, *, fresh_store=False):
    """Run what a page says, in order, but for blocks that need something; give what was printed."""
    write_files(page)
    text = page.read_text(encoding="utf-8")
    told = []
    for block in shell_blocks(page):
        for words in commands(block.text) if block.is_run else ():
            if fresh_store:
                shutil.rmtree("s.zarr", ignore_errors=True)
            if words == ["g2l", "demo"]:  # CI's, and README's own
                continue
            if words[0] == "g2l":
                done = g2l(*small(words[1:]))
                assert done.returncode == 0, f"{words}: {done.stderr}"
                told.append(done.stdout + done.stderr)
            elif words[0] not in {"export", "pip"}:
                subprocess.run(words, check=True)
    return told, [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block[0] != "#"]


@pytest.mark.parametrize("page", [p for p in HOW_TO if p.stem not in {"scale", "cluster"}], ids=lambda page: page.stem)
def test_a_how_to(page, place):
    told, python = play(page)
    assert told
    for block in python:
        exec(block.replace("h-optimus-0", KEY), {})
    if page.stem == "moving":
        assert len(list(FeatureStore.open("north.zarr").slides())) == 3
    if page.stem == "own-encoder":
        assert {"mine", "build"} <= {facts.name for facts in FeatureStore.open("s.zarr").encoders.values()}


def test_how_to_give_a_scale(place):
    path = Path("slides", "p01-1.tiff")
    pixels = tifffile.imread(path)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None)
    Path("slides.csv").write_text("path,mpp\nslides/p01-1.tiff,0.25\nslides/p02-1.tiff,\n", encoding="utf-8")
    page = ROOT / "docs" / "howto" / "scale.md"
    assert "path,mpp\nslides/p01-1.tiff,0.25\nslides/p02-1.tiff,\n" in page.read_text(encoding="utf-8")
    told, _ = play(page, fresh_store=True)
    assert re.search(r"0\.5 +1  override", told[0])
    assert re.search(r"0\.25 +1  manifest", told[1])
    assert "header: openslide.mpp-x" in told[1]


def test_how_to_share_the_work(place):
    ids = [slide.slide_id for slide in FeatureStore.open("s.zarr").slides()]
    for part in (0, 1):
        chosen = [word for slide_id in ids[part::2] for word in ("--slide", slide_id)]
        assert g2l("store", "subset", "s.zarr", f"parts/{part}.zarr", *chosen).returncode == 0
    shutil.rmtree("s.zarr")
    told, _ = play(ROOT / "docs" / "howto" / "cluster.md")
    assert "every recorded shard is as it was written" in told[1]
    assert "all of them were stored already" in told[2]
    assert [slide.slide_id for slide in FeatureStore.open("s.zarr").slides()] == ids


def test_the_read_me(place):
    Path("tasks.toml").write_text('[tasks.a]\nmetrics = ["cka"]\n', encoding="utf-8")
    shutil.rmtree("s.zarr")
    told, _ = play(ROOT / "README.md")
    assert "CKA, debiased" in told[-1]
    assert Path("report", "report.html").is_file()


def test_a_slide_s_answer(place):
    Path("s.zarr").rename("store.zarr")
    task = 'label = "medical_center"\nmetrics = ["probe"]\nprobe_c = [0.1]\nfolds = 2\n'
    Path("TASKS.toml").write_text(f"[tasks.tumor]\n{task}", encoding="utf-8")
    student = ["--student", TEACHER, "--weights", "random:1", "--steps", "2", "--batch-size", "8", "--out", "run/"]
    assert g2l("distill", "--store", "store.zarr", "--teacher", KEY, *student).returncode == 0
    assert g2l("embed", "moved/", "--store", "store.zarr", "--encoder", "run/").returncode == 0
    told, _ = play(ROOT / "docs" / "predicting.md")
    assert len(told) == 3
    assert Path("answers", "predictions.csv").is_file()


def test_a_study_and_the_plan_of_one_without_slides(place):
    page = ROOT / "docs" / "studies.md"
    study, plan = shell_blocks(page)
    for words in commands(study.text):
        done = g2l(*words[1:])
        assert done.returncode == 0, done.stderr
        if words[1] == "init":
            assert 'inputs = ["slides/"]' in Path("study.toml").read_text(encoding="utf-8")
            Path("study.toml").write_text(STUDY, encoding="utf-8")
        assert Path("study").exists() == (words[1] == "run" and "--dry-run" not in words)
    assert Path("study", "report", "report.html").is_file()
    (words,) = commands(plan.text)
    told = g2l(*words[1:]).stdout
    (shown,) = re.findall(r"```text\n(12,000,000.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    left = told.splitlines()
    for line in shown.splitlines():  # in this order, with others between them
        assert line in left, f"{line!r} is not among {left}"
        left = left[left.index(line) + 1 :] if line else left


def test_the_quick_start(place):
    shutil.rmtree("s.zarr")
    told, _ = play(ROOT / "docs" / "quickstart.md")
    assert "CKA, debiased" in told[-1]


def test_compact_pack_and_publish(place):
    told, _ = play(ROOT / "docs" / "interchange.md")
    assert len(told) == 3


def test_every_command_is_run_here_or_says_what_it_needs():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"```(bash|shell|console|zsh)\b", text), f"{page}: shell blocks begin with ```sh"
        for block in shell_blocks(page):
            asks = bool(list(g2l_commands(block.text))) and not block.text.startswith(NEEDS)
            is_set_up = "pip install" in block.text and block.text.count("g2l ") == 1  # CI runs README's
            assert page in RUN or not asks or is_set_up, f"{block.page}: {block.text}"


def test_what_cannot_be_run_here_says_what_it_needs():
    for page in HOW_TO:
        for block in shell_blocks(page):
            if re.search(r"sbatch|torchrun|tcp://|s3://|HF_TOKEN|nextflow run|\.safetensors|pip ", block.text):
                assert block.text.startswith(NEEDS), f"{block.page}: {block.text}"
