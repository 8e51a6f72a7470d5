"""What a user types and reads: every bad input ends in one clear line and the right exit code."""

import csv
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from g2l_core import __version__
from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import write_pyramid
from pipeline.cli.main import main
from tests.conftest import TEACHER
from tests.store.toy import change_facts

G2L = [sys.executable, "-m", "pipeline.cli"]
KEY = "timm-mobilenetv3_small_050-64-random0"


def g2l(*arguments):
    """The console script's own `main` in this process; importing torch anew for each test would take minutes."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["g2l", *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def g2l_process(*arguments):
    return subprocess.run([*G2L, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def cache(source, store, *more):
    return g2l("cache-teacher", source, "--store", store, "--teacher", TEACHER, "--weights", "random:0", *more)


def refused(done, *words, code=2):
    """One line on stderr with these words, no traceback, and the exit code."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "failed"))]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def slides(cohort, tmp_path):
    """Two good slides of the drawn cohort in a folder of their own."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for path in sorted((cohort.parent / "slides").glob("*.tiff"))[:2]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def copy(cached_store, tmp_path):
    return shutil.copytree(cached_store, tmp_path / "store.zarr")


def test_weights_of_each_encoder_that_is_embedded(slides, copy):
    small, other = "timm:mobilenetv3_small_075@64", "timm:test_vit@64"
    embed = ["embed", slides, "--store", copy, "--encoder", small, "--encoder", other, "--batch-size", "8"]
    done = g2l(*embed, "--weights", f"{other}=random:2", "--weights", f"{small}=random:1")
    assert done.returncode == 0, done.stderr
    stored = FeatureStore.open(copy).encoders
    assert {"timm-mobilenetv3_small_075-64-random1", "timm-test_vit-64-random2"} <= stored.keys()
    refused(g2l(*embed, "--weights", "random:1"), "expected ENCODER=WEIGHTS", small, other)
    refused(g2l(*embed, "--weights", f"{small}=random:1", "--weights", f"{small}=random:2"), f"gives {small} two")
    refused(g2l(*embed, "--weights", f"{small}=random:1"), "architecture without weights", other)


# -- stage one ---------------------------------------------------------------------------------------------


def test_a_slide_becomes_a_store_and_a_second_call_does_nothing(slides, tmp_path):
    store = tmp_path / "s.zarr"
    first = cache(slides, store, "--views", "1", "--json")
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)
    assert summary["encoded"] == summary["patches"] > 0
    assert "bottleneck" in first.stderr
    second = cache(slides, store, "--views", "1")
    assert second.returncode == 0
    assert "stored already" in second.stdout


def test_dry_run_counts_and_writes_nothing(slides, tmp_path):
    done = cache(slides, tmp_path / "s.zarr", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)["patches"].values()) > 0
    assert not (tmp_path / "s.zarr").exists()


def test_doubtful_scales_stop_the_cohort_until_accepted(slides, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (2400, 2400, 3), np.uint8)
    write_pyramid(slides / "tenfold.tiff", image, mpp=0.06)  # 128 um are 2,133 of its pixels
    refused(cache(slides, tmp_path / "s.zarr"), "tenfold", "outside the 0.1 to 1.2 um/px", "--accept-mpp")
    assert not (tmp_path / "s.zarr").exists()
    done = cache(slides, tmp_path / "s.zarr", "--views", "0", "--tissue", "none", "--accept-mpp")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 slides have a doubtful scale" in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 120
    again = cache(slides, tmp_path / "s.zarr", "--views", "0", "--tissue", "none")  # what is stored is not asked again
    assert again.returncode == 0, again.stderr


def test_the_picture_s_geojson_is_read_back(slides, tmp_path):
    assert cache(slides, tmp_path / "s.zarr", "--views", "0").returncode == 0
    pictures = tmp_path / "s.qc"
    assert sorted(path.name for path in pictures.iterdir()) == [
        "p01-1.geojson", "p01-1.jpg", "p02-1.geojson", "p02-1.jpg",
    ]  # fmt: skip
    done = cache(slides, tmp_path / "again.zarr", "--views", "0", "--tissue", pictures, "--no-pictures")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "again.qc").exists()
    first, again = (FeatureStore.open(tmp_path / f"{name}.zarr") for name in ("s", "again"))
    for slide in first.slides():
        assert np.array_equal(again.slide(slide.slide_id).coords, slide.coords)
    assert (first.grid["tissue"], again.grid["tissue"]) == ("otsu", "annotations")
    half = json.loads((pictures / "p01-1.geojson").read_text())
    half["features"] = [half["features"][0]]
    half["features"][0]["geometry"] = {
        "type": "Polygon", "coordinates": [[[0, 0], [768, 0], [768, 1536], [0, 1536], [0, 0]]]
    }  # fmt: skip
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "p01-1.geojson").write_text(json.dumps(half))
    done = cache(slides, tmp_path / "half.zarr", "--views", "0", "--tissue", edited)
    refused(done, "p02-1", "no annotation", code=1)
    coords = FeatureStore.open(tmp_path / "half.zarr").slide("p01-1").coords
    assert coords[:, 0].max() == 512
    assert len(coords) == 3 * 6


def test_tissue_by_color_and_what_is_left_out(slides, tmp_path):
    done = cache(slides, tmp_path / "s.zarr", "--views", "0", "--tissue", "color", "--artifacts", "none")
    assert done.returncode == 0, done.stderr
    assert FeatureStore.open(tmp_path / "s.zarr").grid["tissue"] == "color"
    assert "left out" not in done.stdout
    refused(cache(slides, tmp_path / "t.zarr", "--tissue", "ostu"), "unknown tissue method 'ostu'", "otsu")
    for name in ("--artifacts", "--artefacts"):  # and its former name
        refused(cache(slides, tmp_path / "t.zarr", name, "pens"), "unknown artifact 'pens'", "pen")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_gives_nearly_the_same_and_is_another(slides, tmp_path):
    more = ["--views", "0", "--max-patches", "8", "--batch-size", "8"]
    command = ["cache-teacher", slides, "--teacher", "timm:test_vit@64", "--weights", "random:0", *more]
    for name, compiled in (("plain", []), ("compiled", ["--compile"])):
        done = g2l_process(*command, "--store", tmp_path / f"{name}.zarr", *compiled)
        assert done.returncode == 0, done.stderr
    plain, other = (FeatureStore.open(tmp_path / f"{name}.zarr") for name in ("plain", "compiled"))
    (key,) = plain.encoders
    assert (plain.encoders[key].precision, other.encoders[key].precision) == ("fp32", "fp32+compile")
    assert plain.encoders[key].digest != other.encoders[key].digest
    for slide in plain.slides():
        a, b = (store.slide(slide.slide_id).features(key).astype(np.float32) for store in (plain, other))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > 0.9999
    refused(g2l_process(*command, "--store", tmp_path / "plain.zarr", "--compile"), "precision", "fp32+compile")


def test_one_bad_slide_costs_that_slide(slides, tmp_path):
    (slides / "text.svs").write_text("this is no slide")
    done = cache(slides, tmp_path / "s.zarr", "--views", "0")
    refused(done, "text", "neither a slide", code=1)
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert len(list(store.slides())) == 2
    assert "text" in store.failed_slides()


def test_a_truncated_slide_is_named(slides, tmp_path):
    whole = sorted(slides.iterdir())[0]
    (slides / "cut.tiff").write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    done = cache(slides, tmp_path / "s.zarr", "--views", "0")
    assert done.returncode == 1
    assert "failed  cut" in done.stderr


def test_a_slide_without_mpp_says_how_to_give_it(tmp_path):
    rng = np.random.default_rng(0)
    from PIL import Image

    Image.fromarray(rng.integers(0, 256, (600, 600, 3), np.uint8)).save(tmp_path / "photo.png")
    done = cache(tmp_path / "photo.png", tmp_path / "s.zarr")
    refused(done, "photo", "--mpp-override", "manifest", code=1)
    done = cache(tmp_path / "photo.png", tmp_path / "s.zarr", "--mpp-override", "0.5", "--tissue", "none")
    assert done.returncode == 0, done.stderr
    facts = FeatureStore.open(tmp_path / "s.zarr").slide("photo").facts
    assert (facts.mpp, facts.mpp_source) == (0.5, "override")


def test_the_real_slide_without_mpp(slide_without_mpp, tmp_path):
    done = cache(slide_without_mpp, tmp_path / "s.zarr", "--views", "0", "--max-patches", "4")
    refused(done, "--mpp-override", code=1)
    done = cache(slide_without_mpp, tmp_path / "s.zarr", "--views", "0", "--max-patches", "4", "--mpp-override", "0.25")
    assert done.returncode == 0, done.stderr


def test_a_slide_without_tissue(tmp_path):
    write_pyramid(tmp_path / "glass.tiff", np.full((1024, 1024, 3), 242, np.uint8), mpp=0.5)
    refused(cache(tmp_path / "glass.tiff", tmp_path / "s.zarr"), "glass", "--tissue none", code=1)


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(cache(tmp_path / "empty", tmp_path / "s.zarr"), "holds no slide")


def test_an_absent_input(tmp_path):
    refused(cache(tmp_path / "nowhere", tmp_path / "s.zarr"), "no such file or folder")


@pytest.mark.parametrize(
    ("option", "field"),
    [(("--seed", "3"), "grid.seed"), (("--mpp", "0.6"), "grid.mpp"), (("--crop-px", "200"), "views.crop_px")],
)
def test_a_store_made_otherwise(slides, copy, option, field):
    refused(cache(slides, copy, *option), field, "another --store")


def test_a_folder_that_is_no_store(slides, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    refused(cache(slides, tmp_path / "other"), "is no store")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_an_unknown_encoder_suggests_the_nearest(slides, tmp_path):
    done = g2l("cache-teacher", slides, "--store", tmp_path / "s.zarr", "--teacher", "h-optimus")
    refused(done, "unknown encoder 'h-optimus'", "h-optimus-0")
    done = g2l("cache-teacher", slides, "--store", tmp_path / "s.zarr", "--teacher", "timm:vit_tiny_patch16_244")
    refused(done, "vit_tiny_patch16_224")


def test_patches_at_another_scale_are_encoded_only_when_forced(slides, tmp_path):
    spec = tmp_path / "fine.toml"
    spec.write_text(
        'architecture = "mobilenetv3_small_050"\nweights = "random:0"\ninput_px = 64\nmpp = 0.25\n'
        "mean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
    )
    common = ("cache-teacher", slides, "--store", tmp_path / "s.zarr", "--teacher", spec, "--views", "0")
    refused(g2l(*common), "fine expects 0.25 um/px", "have 0.5", "--force-mpp")
    assert not (tmp_path / "s.zarr").exists()
    done = g2l(*common, "--force-mpp")
    assert done.returncode == 0, done.stderr
    assert list(FeatureStore.open(tmp_path / "s.zarr").encoders) == ["fine-random0"]


def test_an_architecture_without_weights(slides, tmp_path):
    done = g2l("cache-teacher", slides, "--store", tmp_path / "s.zarr", "--teacher", TEACHER)
    refused(done, "without weights", "random:SEED")


def test_features_that_are_not_finite(slides, tmp_path):
    """Weights with one NaN: nothing is stored, the slide and the patch are named."""
    from safetensors.torch import load_file, save_file

    from g2l_core.encoders.loading import build_network
    from g2l_core.encoders.resolve import resolve_encoder

    state = build_network(resolve_encoder(TEACHER, weights="random:0")).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "good.safetensors")
    damaged = load_file(tmp_path / "good.safetensors")
    damaged["conv_stem.weight"][0] = float("nan")
    save_file(damaged, tmp_path / "bad.safetensors")
    done = g2l(
        *("cache-teacher", slides, "--store", tmp_path / "s.zarr", "--teacher", TEACHER),
        *("--weights", tmp_path / "bad.safetensors", "--views", "0"),
    )
    assert done.returncode in {1, 2}
    assert "not finite" in done.stderr
    assert "Traceback" not in done.stderr
    if (tmp_path / "s.zarr").exists():
        for slide in FeatureStore.open(tmp_path / "s.zarr").slides():
            assert not any(slide.records(encoder) for encoder in slide.encoder_keys)


def test_wrong_usage_is_click_s_own_message(tmp_path):
    done = g2l_process("cache-teacher", tmp_path, "--stoer", "x")
    assert done.returncode == 2
    assert "--stoer" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_needs_no_command():
    done = g2l("--version")
    assert (done.returncode, done.stdout) == (0, f"g2l {__version__}\n")


def test_debug_shows_the_traceback(tmp_path):
    done = g2l_process("--debug", "store", "ls", tmp_path / "nothing")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "StoreMissingError" in done.stderr


# -- stage two ---------------------------------------------------------------------------------------------


def distill(store, out, *more):
    return g2l(
        *("distill", "--store", store, "--teacher", KEY, "--student", "timm:mobilenetv3_small_050@64"),
        *("--weights", "random:1", "--out", out, "--steps", "2", "--batch-size", "8", "--workers", "1", *more),
    )


def test_a_recipe_stands_where_the_command_line_gives_nothing(cached_store, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'teacher = "{KEY}"\nstudent = "{TEACHER}"\nlr = 1e-3\nsteps = 2\nwhere = ["slide_id=p0*"]\n')
    common = ("distill", "--config", recipe, "--store", cached_store, "--weights", "random:1", "--batch-size", "8")
    done = g2l(*common, "--out", tmp_path / "run", "--lr", "5e-4")
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (chosen["train"]["optim"]["lr"], chosen["train"]["steps"], chosen["where"]) == (5e-4, 2, ["slide_id=p0*"])
    recipe.write_text("lrr = 1e-3\n")
    refused(g2l(*common, "--out", tmp_path / "other"), "unknown option in", "'lrr'", "lr")
    refused(g2l("distill", "--config", "brest", "--out", tmp_path / "other"), "unknown recipe 'brest'", "breast")


def test_a_student_is_exported_and_swept_from_the_command_line(cached_store, tmp_path):
    assert distill(cached_store, tmp_path / "run").returncode == 0
    done = g2l("export-student", tmp_path / "run", "--format", "torchscript")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run-torchscript" / "model.pt").exists()
    refused(g2l("export-student", tmp_path / "nothing"), "nothing")
    fixed = [f for option in ("steps=1", "batch_size=8", "seed=0", "loss=mse") for f in ("--set", option)]
    done = g2l(
        *("sweep", "losses", "--store", cached_store, "--teacher", KEY, "--student", TEACHER, "--weights", "random:1"),
        *("--out", tmp_path / "sweep", *fixed),
    )
    assert done.returncode == 0, done.stderr
    assert "Log-Sum against standard losses" in done.stdout
    assert (tmp_path / "sweep" / "run" / "student").is_dir()
    refused(g2l("sweep", "loses", *map(str, done.args[2:])), "unknown recipe 'loses'", "losses")


def test_decoded_patches_are_kept_where_asked(cached_store, tmp_path):
    done = distill(cached_store, tmp_path / "run", "--pixel-cache", tmp_path / "pixels", "--targets-gb", "0")
    assert done.returncode == 0, done.stderr
    assert any(np.fromfile(path, np.uint64).any() for path in (tmp_path / "pixels").glob("*.hashes"))
    plain = distill(cached_store, tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    losses = [(tmp_path / name / "log.csv").read_text().split(",")[9] for name in ("run", "plain")]
    assert losses[0] == losses[1]


def test_an_output_folder_that_is_something_else(cached_store, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    refused(distill(cached_store, tmp_path), "is no run of g2l distill")


def test_a_teacher_that_is_not_in_the_store(cached_store, tmp_path):
    done = g2l(
        *("distill", "--store", cached_store, "--teacher", "h-optimus-0"),
        *("--student", TEACHER, "--weights", "random:0", "--out", tmp_path / "run"),
    )
    refused(done, "unknown encoder 'h-optimus-0'", "g2l store ls")
    assert not (tmp_path / "run").exists()


def test_a_store_with_the_canonical_view_alone(slides, tmp_path):
    assert cache(slides, tmp_path / "s.zarr", "--views", "0").returncode == 0
    refused(distill(tmp_path / "s.zarr", tmp_path / "run"), "only the canonical view", "--views 2")


def test_fewer_patches_than_a_batch(cached_store, tmp_path):
    refused(distill(cached_store, tmp_path / "run", "--batch-size", "5000"), "fewer than one batch of 5000")


def test_a_slide_that_has_changed(copy, tmp_path):
    change_facts(FeatureStore.open(copy, writable=True).slide("p01-1"), fingerprint="0" * 32, file_state=None)
    refused(distill(copy, tmp_path / "run"), "p01-1", "is not the file that was cached")


def test_conditions_that_fit_nothing(cached_store, tmp_path):
    refused(distill(cached_store, tmp_path / "run", "--where", "split=nowhere"), "no slide", "split=nowhere")
    refused(distill(cached_store, tmp_path / "run", "--hold-out", "most"), "--hold-out most")


# -- stage three -------------------------------------------------------------------------------------------


def bench(store, tasks, tmp_path, *more):
    (tmp_path / "tasks.toml").write_text(tasks)
    return g2l("bench", tmp_path / "tasks.toml", "--store", store, "--encoders", KEY, "--out", tmp_path / "out", *more)


def write_labels(tmp_path, rows):
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


TASK = '[tasks.t]\nlabels = "labels.csv"\nlabel = "kind"\nsplit = "split"\nmetrics = ["knn"]\nknn_k = 3\n'


def test_a_label_file_that_names_absent_slides(cached_store, tmp_path):
    write_labels(
        tmp_path,
        [{"slide_id": "p01-1", "kind": "a", "split": "train"}, {"slide_id": "zz", "kind": "b", "split": "test"}],
    )
    done = bench(cached_store, TASK, tmp_path)
    assert done.returncode == 2
    assert "names slides that no store has: zz" in done.stderr


def test_train_and_test_that_share_a_patient(cached_store, tmp_path):
    store = FeatureStore.open(cached_store)
    rows = [
        {"slide_id": s.slide_id, "x": str(x), "y": str(y), "kind": "ab"[i % 2], "split": ("train", "test")[i % 3 == 0]}
        for s in store.slides()
        for i, (x, y) in enumerate(s.coords.tolist())
    ]
    write_labels(tmp_path, rows)
    done = bench(cached_store, TASK, tmp_path)
    assert done.returncode == 2
    assert "6 patients are in train and test, first 'p01'" in done.stderr


def test_a_bad_task_file(cached_store, tmp_path):
    refused(bench(cached_store, "[tasks.t]\nlabell = 'x'\n", tmp_path), "'labell'", "Did you mean label")
    refused(bench(cached_store, "[tasks.t]\nknn_k = 'three'\n", tmp_path), "knn_k must be a whole number")
    refused(bench(cached_store, "tasks = [", tmp_path), "cannot read the task file")
    refused(bench(cached_store, "title = 'no tasks'\n", tmp_path), "[tasks.NAME]")


def test_a_device_that_bench_has_not(cached_store, tmp_path):
    tasks = '[tasks.t]\nmetrics = ["cka"]\n'
    refused(bench(cached_store, tasks, tmp_path, "--device", "gpu"), "unknown device 'gpu'", "cpu")


# -- looking -----------------------------------------------------------------------------------------------


def test_looking_at_a_store(cached_store):
    listed = g2l("store", "ls", cached_store)
    assert listed.returncode == 0
    assert listed.stdout.count(f"{KEY} 3 views") == 6
    info = g2l("store", "info", cached_store)
    assert "6 slides" in info.stdout
    assert "random:0" in info.stdout
    assert "max-patches none" in info.stdout
    assert "artifacts " in info.stdout
    assert all(len(line) <= 100 for line in info.stdout.splitlines())
    verified = g2l("store", "verify", cached_store)
    assert verified.returncode == 0, verified.stdout


def test_models_lists_the_table():
    done = g2l("models")
    assert "h-optimus-0" in done.stdout
    assert "1,134.8 M" in done.stdout
    assert "bioptimus/H-optimus-0" in g2l("models", "H_Optimus_0").stdout


def test_there_is_no_store(tmp_path):
    refused(g2l_process("store", "ls", tmp_path / "none.zarr"), "there is no store at")
