"""Know before you run: the arithmetic by hand, and the command on drawn slides."""

import json
from math import isinf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.encoders.resolve import resolve_encoder
from pipeline.forecast import Speeds, forecast, gigabytes, speed_up, view_choices
from pipeline.gpus import GPUS, forward_tflop, published_speeds
from tests.conftest import TEACHER
from tests.pipeline.test_cli import g2l

GPU = Speeds(patches=256, read=0.010, augment=0.001, encode={"teacher": 0.002}, shares_cores=False)


def test_a_forecast_by_hand():
    # three views: 6 ms to encode a patch, 13 ms to read and augment it, in four threads 3.25 ms
    found = forecast(GPU, 3_600_000, 3, workers=4)
    assert found.hours == pytest.approx(6.0)
    assert found.bottleneck == "encode"
    assert found.patches_needed == pytest.approx(1 / 0.006)
    assert found.patches_read == pytest.approx(4 / 0.013)
    assert found.enough_workers == 3
    slow = forecast(GPU, 3_600_000, 3, workers=1)
    assert (slow.hours, slow.bottleneck) == (pytest.approx(13.0), "read")


def test_on_one_processor_the_times_add_up():
    cpu = Speeds(patches=1, read=0.010, augment=0.001, encode={"a": 0.002, "b": 0.004}, shares_cores=True)
    assert forecast(cpu, 3_600_000, 3, workers=2).hours == pytest.approx(18 + 6.5)


def test_the_published_table_of_speed_ups():
    table = {(1, 5): (1.79, 1.49, 1.12, 1.00), (1, 10): (1.99, 1.79, 1.49, 1.00), (5, 5): (2.13, 2.03, 1.86, 1.79)}
    for (runs, epochs), row in table.items():
        found = [speed_up(views, epochs, runs, 1.23) for views in (1, 2, 4, epochs)]
        assert found == pytest.approx(row, abs=0.006)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20), st.floats(0.01, 50))
def test_laws_of_the_speed_up(views, epochs, runs, ratio):
    assert speed_up(views, epochs, runs, ratio) < ratio + 1
    assert speed_up(views + 1, epochs, runs, ratio) < speed_up(views, epochs, runs, ratio)
    assert speed_up(views, epochs, runs + 1, ratio) > speed_up(views, epochs, runs, ratio)
    assert speed_up(epochs, epochs, 1, ratio) == pytest.approx(1)


def test_gigabytes_and_choices():
    assert gigabytes(10_000_000, 1, [1536]) == pytest.approx(30.72)  # a thousand slides of ten thousand patches
    assert gigabytes(100, 3, [1024, 512]) == pytest.approx(100 * 3 * 1536 * 2 / 1e9)
    assert view_choices(10) == [1, 2, 3, 4, 10]
    assert view_choices(30) == [1, 2, 4, 10, 30]
    assert view_choices(2) == [1, 2, 4]
    free = Speeds(patches=1, read=0.0, augment=0.0, encode={}, shares_cores=True)
    assert isinf(forecast(free, 1, 1, 1).patches_needed)


def plan(*arguments):
    return g2l("plan", *arguments, "--teacher", TEACHER, "--weights", "random:0", "--batch-size", "8")


def test_the_plan_of_a_cohort(cohort, tmp_path):
    done = plan(cohort, "--views", "1", "--epochs", "5")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "p06-1" in done.stdout
    assert "sets the pace" in done.stdout
    assert "1.79 x" in done.stdout
    assert "online" in done.stdout
    assert list(tmp_path.iterdir()) == []
    facts = json.loads(plan(cohort, "--views", "1", "--json").stdout)
    total = sum(facts["patches"].values())
    assert facts["gigabytes"] == pytest.approx(total * 2 * 1024 * 2 / 1e9)
    assert facts["measured"]["patches"] == total < 256
    assert facts["forecast"]["hours"] > 0
    assert [row["views"] for row in facts["views_table"]] == [1, 2, 3, 4, 10]


def test_a_dry_run_is_the_same_plan(cohort, tmp_path):
    arguments = ["--teacher", TEACHER, "--weights", "random:0", "--views", "1", "--json"]
    done = g2l("cache-teacher", cohort, "--store", tmp_path / "s.zarr", *arguments, "--dry-run")
    other = g2l("plan", cohort, *arguments)
    ours, theirs = json.loads(done.stdout), json.loads(other.stdout)
    for facts in (ours, theirs):  # what was timed differs from call to call
        del facts["measured"], facts["forecast"]
        for row in facts["views_table"]:
            del row["hours"]
    assert ours == theirs
    assert not (tmp_path / "s.zarr").exists()


def test_an_encoder_that_cannot_be_had_is_not_measured(cohort, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment is read at its import
    done = g2l("plan", cohort, "--teacher", "h-optimus-0")
    assert done.returncode == 0, done.stderr
    assert "not measured: h-optimus-0" in done.stdout
    assert "MB a view" in done.stdout


@pytest.mark.parametrize(
    "call", [["plan"], ["cache-teacher", "--store", "s.zarr", "--dry-run"], ["cache-teacher", "--store", "s.zarr"]]
)
@pytest.mark.parametrize(
    ("teacher", "sizes"), [("h-optimus-0@225", "224 and 238"), ("timm:vit_tiny_patch16_224@225", "224 and 240")]
)
def test_an_input_side_is_refused_before_weights_and_slides(tmp_path, monkeypatch, call, teacher, sizes):
    """Neither can be read here, so that a plan that looked at them would end otherwise."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.svs").write_text("no slide")
    (tmp_path / "w.pth").write_text("no weights")
    weights = ["--weights", "w.pth"] if teacher.startswith("timm") else []
    done = g2l(*call, tmp_path / "in", "--teacher", teacher, *weights)
    assert done.returncode == 2
    assert f"{teacher}: an input of 225 px is no multiple of the network's" in done.stderr
    assert f"The next sizes are {sizes}" in done.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_sets_of_images_beside_a_slide(cohort, oscc_patches):
    done = plan(cohort.parent / "slides/p01-1.tiff", oscc_patches, "--patch-px", "224", "--json")
    facts = json.loads(done.stdout)
    assert facts["patches"]["train/OSCC"] + facts["patches"]["train/Normal"] + facts["patches"]["test/OSCC"] > 1000
    assert len(facts["patches"]) == 5
    assert facts["measured"]["patches"] >= 256


def test_failed_slides_are_named(cohort, tmp_path):
    (tmp_path / "broken.svs").write_text("no slide")
    done = plan(cohort, tmp_path)
    assert done.returncode == 1
    assert "failed  broken: " in done.stdout


def test_a_forward_pass_is_counted_as_others_count_it():
    # GMACs as in timm's results/benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv
    for name, gmacs in (("vit_large_patch16_224", 61.6), ("vit_huge_patch14_224", 167.4)):
        spec = resolve_encoder(f"timm:{name}", weights="random:0")
        assert forward_tflop(spec) == pytest.approx(2 * gmacs / 1e3, rel=0.01)


def test_published_speeds_foretell_other_published_ones():
    """The figures are of one network on each card; timm timed others on the same cards."""
    published = {
        "rtx3090": {"vit_base_patch16_224": 1572.08, "vit_large_patch16_224": 487.63, "vit_huge_patch14_224": 183.75},
        "rtx4090": {"vit_base_patch16_224": 2843.0, "vit_large_patch16_224": 903.87, "vit_huge_patch14_224": 348.57},
    }
    for gpu, images in published.items():
        specs = [resolve_encoder(f"timm:{name}", weights="random:0") for name in images]
        seconds = published_speeds(specs, GPUS[gpu]).encode
        for name, rate in images.items():
            assert 1 / seconds[f"timm:{name}"] == pytest.approx(rate, rel=0.25), (gpu, name)


def test_a_forecast_without_slides_or_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cohort = ["--slides", "1000", "--patches-per-slide", "12000", "--views", "1"]
    done = g2l("plan", *cohort, "--teacher", "hibou-l", "--gpu", "RTX 4090", "--workers", "16", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["total"] == 12_000_000
    assert facts["gigabytes"] == pytest.approx(12e6 * 2 * 1024 * 2 / 1e9)
    seconds = facts["measured"]["encode"]["hibou-l"]
    assert facts["forecast"]["hours"] == pytest.approx(12e6 * 2 * seconds / 3600)
    assert any("published" in source and "rtx4090" in source for source in facts["sources"])
    text = g2l("plan", *cohort, "--teacher", "hibou-l", "--gpu", "h200").stdout
    assert "assumed" in text
    assert "not measured" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    small = g2l("plan", *cohort, "--teacher", "efficientnet-lite0", "--gpu", "h200").stdout
    assert "takes longer than that" in " ".join(small.split())
    for arguments, words in {
        ("--slides", "10"): "needs all of --slides, --patches-per-slide and --gpu",
        (*cohort, "--gpu", "h200", "slides/"): "no INPUT",
        (): "expected INPUT",
        (*cohort, "--gpu", "h2000"): "Did you mean h200",
    }.items():
        refused = g2l("plan", *arguments, "--teacher", "hibou-l")
        assert refused.returncode == 2
        assert words in refused.stderr
    assert list(tmp_path.iterdir()) == []
