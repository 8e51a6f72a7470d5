"""Ways to distill: a live teacher, several processes, other settings, recipes, sweeps, exports; and refusals."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from g2l_core.distillation.replay import good_rows
from g2l_core.distillation.target_statistics import target_statistics
from g2l_core.encoders.loading import encode_all, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.student_export import FORMATS, export_student
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.errors import EncoderError, G2LError, RunError, StoreCorruptError, UnknownNameError, UsageError
from g2l_core.store.features import FeatureStore
from pipeline.config import NAMES, OPTIONS, RECIPES, find_recipe, read_recipe, read_toml, settings_of
from pipeline.distill import DistillHow, run_distill
from pipeline.split import split_store
from pipeline.sweep import read_sweep, run_sweep, sweep_text
from tests.conftest import TEACHER
from tests.distillation.test_training import rows
from tests.pipeline.test_distill import KEY, settings, student, tensors
from tests.store.toy import put_features


def log(folder, column="loss"):
    return [float(row[column]) for row in rows(folder / "log.csv")]


# ---- the teacher run live ---------------------------------------------------------------------------------------


def test_cached_and_online_give_the_same_losses_to_float16(cached_store, tmp_path):
    teacher = resolve_encoder(TEACHER, weights="random:0")
    cached = run_distill(cached_store, KEY, student(), tmp_path / "cached", settings())
    online = run_distill(cached_store, teacher, student(), tmp_path / "online", settings(online=True))
    np.testing.assert_allclose(log(tmp_path / "online"), log(tmp_path / "cached"), rtol=2e-3)
    assert online.before["cka_debiased"] == pytest.approx(cached.before["cka_debiased"], abs=1e-3)
    record = json.loads((tmp_path / "online" / "run.json").read_text())
    assert record["teacher"]["online"]
    assert "run live" in record["result"]["exported"]["trained_on"]


def test_online_needs_no_features_and_has_new_views_every_epoch(cached_store, tmp_path):
    bare = shutil.copytree(cached_store, tmp_path / "bare.zarr")
    for slide in FeatureStore.open(bare).slides():
        shutil.rmtree(bare / "slides" / slide.slide_id / "features")
    teacher = resolve_encoder(TEACHER, weights="random:0")
    chosen = settings(online=True, views=0, epochs=3, steps=None, validate_every=20)
    run_distill(bare, teacher, student(), tmp_path / "run", chosen, epochs=3)
    assert max(log(tmp_path / "run", "epoch")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "--views must be at least 1; 0, new views every epoch, needs --online"),
        ({"views": 3}, "has 2 augmented views, not 3, of .*: run g2l cache-teacher with --views 3"),
        ({"online": True, "loss": "kl_queue"}, "a live teacher has no stored targets"),
        ({"keep": "first"}, "unknown weights to keep 'first'"),
        ({"slides": 99}, "--slides 99: there are 3 slides to train on"),
        ({"projector": "conv"}, "unknown projector 'conv'"),
        ({"grad_checkpoint": True}, None),
    ],
)
def test_settings_are_refused_before_training_starts(cached_store, tmp_path, options, message):
    if message is None:
        run_distill(cached_store, KEY, student(), tmp_path / "run", settings(steps=1, **options))
        return
    with pytest.raises(G2LError, match=message):
        run_distill(cached_store, KEY, student(), tmp_path / "run", settings(**options))
    assert not (tmp_path / "run" / "log.csv").exists()


def test_a_nan_in_the_store_is_refused_before_training_starts(cached_store, tmp_path):
    copy = shutil.copytree(cached_store, tmp_path / "copy.zarr")
    for slide in FeatureStore.open(copy, writable=True).slides():
        features = slide.features(KEY, view=1)
        features[3, 5] = np.nan
        put_features(slide, KEY, features, view=1)
    with pytest.raises(StoreCorruptError, match="row 3: stored features of .* are not finite; run g2l store verify"):
        run_distill(copy, KEY, student(), tmp_path / "run", settings())
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_refused_before_training_starts(cached_store, tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "w.pt")
    spec = resolve_encoder("timm:mobilenetv3_small_050@64", weights=str(tmp_path / "w.pt"))
    with pytest.raises(EncoderError, match="the weights do not fit the architecture"):
        run_distill(cached_store, KEY, spec, tmp_path / "run", settings())
    assert not (tmp_path / "run").exists()


# ---- statistics of the targets --------------------------------------------------------------------------------


def test_statistics_are_those_of_all_training_targets(cached_store):
    store = FeatureStore.open(cached_store)
    chosen = {slide.slide_id: good_rows(slide)[::2] for slide in store.slides()}
    found = target_statistics(store, chosen, KEY, range(1, 3))
    values = np.concatenate([store.slide(i).features(KEY, view=v)[r] for i, r in chosen.items() for v in (1, 2)])
    np.testing.assert_allclose(found.mean, values.astype(np.float64).mean(0), rtol=1e-4, atol=1e-5)
    wanted = values.astype(np.float64).std(0)
    np.testing.assert_allclose(found.deviation, np.maximum(wanted, 1e-3 * wanted.max()), rtol=1e-3, atol=1e-5)
    assert found.bank.shape == (sum(map(len, chosen.values())), values.shape[1])


@pytest.mark.parametrize("loss", ["kl_queue", "mse"])
def test_losses_on_dataset_statistics_learn(cached_store, tmp_path, loss):
    run_distill(cached_store, KEY, student(), tmp_path / "run", settings(loss=loss, teacher_norm="dataset", steps=30))
    found = log(tmp_path / "run")
    assert np.mean(found[-5:]) < np.mean(found[:5])


def test_fewer_slides_are_among_more(cached_store):
    store = FeatureStore.open(cached_store)
    chosen = [set(split_store(store, (), "0.34", 0, slides=n).train) for n in (1, 2, 3)]
    assert [len(c) for c in chosen] == [1, 2, 3]
    assert chosen[0] < chosen[1] < chosen[2]


# ---- several processes ----------------------------------------------------------------------------------------


def torchrun(processes: int, *arguments) -> None:
    """`g2l distill` in so many processes on the CPU, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "-m", "pipeline.cli.main", "distill", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


RANKS_STUDENT = "timm:vit_tiny_patch16_224@32"

WITHOUT_GRADIENT = {"bias", "norm.bias"}
"""The projector's bias and, before it, the last norm's: batch statistics take them away, as the softmax takes the keys'
bias. Their gradient is zero but for rounding, and Adam divides rounding by its own size."""


@pytest.mark.slow
def test_two_ranks_of_16_are_one_of_32(cached_store, tmp_path):
    """Global statistics and reduction: the same weights to 1e-5 after 20 steps, and the same losses."""
    common = [
        *(
            "--store",
            cached_store,
            "--teacher",
            KEY,
            "--student",
            "timm:vit_tiny_patch16_224@32",
            "--weights",
            "random:1",
        ),
        *("--steps", 20, "--reduce", "global", "--batch-statistics", "global", "--early-stop", 0, "--hold-out", 0.34),
        *("--workers", 1, "--validate-every", 20, "--checkpoint-every", 20, "--pool-blocks", 2),
    ]
    torchrun(2, *common, "--batch-size", 16, "--out", tmp_path / "two")
    torchrun(1, *common, "--batch-size", 32, "--out", tmp_path / "one")
    two, one = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    start = load_encoder(resolve_encoder(RANKS_STUDENT, weights="random:1")).module.network.state_dict()
    assert float((start["blocks.0.attn.qkv.weight"] - one["blocks.0.attn.qkv.weight"]).abs().max()) > 1e-4
    for name in one:
        if name not in WITHOUT_GRADIENT:
            values = [t[name].view(3, -1)[[0, 2]] if "qkv.bias" in name else t[name] for t in (two, one)]
            assert float((values[0] - values[1]).abs().max()) < 1e-5, name
    for column in ("loss", "loss_per_element"):
        np.testing.assert_allclose(log(tmp_path / "two", column), log(tmp_path / "one", column), rtol=1e-5)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["ranks"] == 2


# ---- recipes and options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_is_the_papers(path):
    options = read_recipe(path.stem)
    chosen, epochs = settings_of({k: v for k, v in options.items() if k not in {"teacher", "student"}})
    assert (options["teacher"], options["student"]) == ("h-optimus-0", "hibou-l")
    assert (chosen.train.objective.loss, chosen.train.objective.alpha) == ("logsum", 4.0)
    assert (chosen.train.optim.lr, chosen.train.optim.weight_decay, chosen.batch_size) == (1e-4, 0.05, 32)
    assert (chosen.train.optim.early_stop_patience, chosen.train.optim.early_stop_window) == (10, 100)
    assert epochs == 5


@pytest.mark.parametrize("path", sorted((RECIPES / "sweeps").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_can_be_run(path):
    sweep = read_sweep(path.stem, [])
    for run in sweep.runs():
        settings_of({**sweep.base, **run})
    assert sweep.title


def test_options_of_a_recipe_that_are_none(tmp_path):
    (tmp_path / "mine.toml").write_text("lr = 1e-3\nlearning_rate = 1.0\n")
    with pytest.raises(UnknownNameError, match="unknown option in .*mine.toml 'learning_rate'"):
        read_recipe(str(tmp_path / "mine.toml"))
    with pytest.raises(UnknownNameError, match="unknown recipe 'brest'. Did you mean breast"):
        find_recipe("brest")
    with pytest.raises(UsageError, match="cannot read"):
        read_toml(tmp_path / "absent.toml")
    assert {"loss", "lr", "early_stop", "views", "slides", "steps", "teacher"} <= {*NAMES, *OPTIONS}


# ---- sweeps ---------------------------------------------------------------------------------------------------

SWEEP = """
title = "Losses"
[base]
steps = 4
lr = 1e-3
batch_size = 8
pool_blocks = 2
hold_out = "0.34"
early_stop = 0
[grid]
loss = ["logsum", "mse"]
alpha = [2.0, 4.0]
seed = [0, 1]
"""


def test_a_sweep_runs_every_combination_once_and_resumes(cached_store, tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    sweep = read_sweep(str(tmp_path / "sweep.toml"), ["steps=3"])
    assert len(sweep.runs()) == 6  # two alphas of logsum, one mse, two seeds
    found = run_sweep(
        sweep, cached_store, KEY, "timm:mobilenetv3_small_050@64", "random:1", tmp_path / "s", DistillHow(resume=True)
    )
    assert not found.failed
    with (tmp_path / "s" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["loss"] for row in table] == ["logsum"] * 4 + ["mse"] * 2
    assert {row["steps"] for row in table} == {"3"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*/log.csv")}
    shutil.rmtree(tmp_path / "s" / "loss=mse,seed=1")
    again = run_sweep(
        sweep, cached_store, KEY, "timm:mobilenetv3_small_050@64", "random:1", tmp_path / "s", DistillHow(resume=True)
    )
    assert [r.after for r in again.finished] == [r.after for r in found.finished]
    after = {p: p.stat().st_mtime_ns for p in before if "mse,seed=1" not in str(p)}
    assert all(before[path] == time for path, time in after.items())
    text = sweep_text(found, tmp_path / "s")
    assert all(len(line) <= 80 for line in text.splitlines()[:-1])
    assert "loss logsum, alpha 2.0" in text
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "loss mse" in page
    for named in (str(cached_store), "timm:mobilenetv3_small_050@64", "CKA of every setting", "CKA over alpha"):
        assert named in page
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 6
    assert all((tmp_path / "s" / unquote(link)).is_file() for link in links)
    assert "±" in page
    mean = np.mean([r.after["cka_debiased"] for r in found.finished if r.varied.get("loss") == "mse"])
    assert f"{mean:.3f}" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[grid]", "[gird]", "unknown table or key 'gird'"),
        ('loss = ["logsum", "mse"]', 'losss = ["mse"]', "unknown option in .* 'losss'. Did you mean loss"),
        ('loss = ["logsum", "mse"]', 'loss = "mse"', "loss in .grid. must be a list of values"),
        ('loss = ["logsum", "mse"]', 'student = ["hibou-l"]', "student is given on the command line"),
        ("lr = 1e-3", "lr = -1.0", "expected lr > 0"),
    ],
)
def test_sweeps_that_cannot_be_run(cached_store, tmp_path, old, new, message):
    (tmp_path / "sweep.toml").write_text(SWEEP.replace(old, new))
    who = (cached_store, KEY, TEACHER, "random:1", tmp_path / "s", DistillHow(resume=True))
    with pytest.raises(UsageError, match=message):
        run_sweep(read_sweep(str(tmp_path / "sweep.toml"), []), *who)
    assert not (tmp_path / "s").exists()
    with pytest.raises(UsageError, match="expected NAME=VALUE"):
        read_sweep("losses", ["steps"])


# ---- the student leaves ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_run(cached_store, tmp_path_factory):
    """A small DINOv2 with registers, Hibou's make, after two steps."""
    folder = tmp_path_factory.mktemp("vit")
    (folder / "small.toml").write_text(
        'architecture = "vit_small_patch14_reg4_dinov2"\nweights = "random:1"\ninput_px = 56\npooling = "cls"\n'
        "mean = [0.7, 0.6, 0.7]\nstd = [0.2, 0.2, 0.2]\nmpp = 0.5\n"
        "[arguments]\nimg_size = 56\ndepth = 2\nembed_dim = 48\nnum_heads = 3\n"
    )
    run_distill(cached_store, KEY, resolve_encoder(str(folder / "small.toml")), folder / "run", settings(steps=2))
    return folder / "run"


def normalized(n=3):
    return torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(3))


def features_of(run, images):
    with torch.inference_mode():
        return load_encoder(resolve_encoder(str(run))).module.pooled(images)


def test_timm_folder(vit_run, tmp_path):
    out = export_student(vit_run, "timm", tmp_path / "timm").out
    model = import_timm().create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(normalized())[:, 0], features_of(vit_run, normalized()))


def test_torchscript_file(vit_run, tmp_path):
    out = export_student(vit_run, "torchscript", tmp_path / "script").out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = torch.jit.load(out / "model.pt")
    torch.testing.assert_close(loaded(normalized()), features_of(vit_run, normalized()))
    said = json.loads((out / "preprocessing.json").read_text())
    assert (said["input_px"], said["mean"], said["pooling"]) == (56, [0.7, 0.6, 0.7], "cls")


@pytest.mark.slow
def test_onnx_file(vit_run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra onnx)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra onnx)")
    out = export_student(vit_run, "onnx", tmp_path / "onnx").out
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 3):
        found = session.run(None, {"images": normalized(n).numpy()})[0]
        np.testing.assert_allclose(found, features_of(vit_run, normalized(n)), rtol=1e-4, atol=1e-4)


def test_transformers_layout_and_back(vit_run, tmp_path):
    """Transformers loads it and gives the features; loaded back as weights it is the same encoder bit for bit."""
    transformers = pytest.importorskip("transformers", reason="transformers is no dependency of G2L")
    out = export_student(vit_run, "transformers", tmp_path / "hf").out
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.inference_mode():
        found = model(normalized()).pooler_output
    torch.testing.assert_close(found, features_of(vit_run, normalized()), rtol=1e-5, atol=1e-5)
    spec = resolve_encoder(str(vit_run.parent / "small.toml"), weights=str(out / "model.safetensors"))
    assert load_encoder(spec).digest == load_encoder(resolve_encoder(str(vit_run))).digest
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.7, 0.6, 0.7]


def test_exports_that_cannot_be(vit_run, cached_store, tmp_path):
    run_distill(cached_store, KEY, student(), tmp_path / "cnn", settings(steps=1))
    with pytest.raises(EncoderError, match="this network has no reg_token"):
        export_student(tmp_path / "cnn", "transformers", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(UnknownNameError, match="unknown format 'tim'. Did you mean timm"):
        export_student(vit_run, "tim", tmp_path / "x")
    with pytest.raises(RunError, match="exists; give another --out"):
        export_student(vit_run, "timm", tmp_path)
    assert {"timm", "torchscript", "onnx", "transformers"} < set(FORMATS)


def test_the_model_card_says_what_it_is_made_of(vit_run):
    card = (vit_run / "student" / "README.md").read_text()
    record = json.loads((vit_run / "run.json").read_text())
    for fact in (TEACHER, record["teacher"]["digest"][:12], "step 2 of 2", "loss logsum", "library_name: timm",
                 f"{sum(record['rows']['train'].values()):,} patches of 3 slides", "| cka_debiased |", "## Terms",
                 "This student is "):  # fmt: skip
        assert fact in card
    own, with_projector = card.partition("own features")[2].split("With the projector")
    assert "_projected |" not in own
    rows = [line for line in with_projector.splitlines() if line.startswith("| ") and "metric" not in line]
    assert len(rows) == 4
    assert all("_projected" in row for row in rows)


def test_the_card_s_own_python_gives_the_features(vit_run, tmp_path):
    """What the model card tells people to type, typed."""
    from PIL import Image

    card = (vit_run / "student" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    import_timm()
    names = {"patch": Image.fromarray(pixels)}
    with torch.inference_mode():
        exec(code.replace("FOLDER", str(vit_run / "student")), names)
    wanted = encode_all(load_encoder(resolve_encoder(str(vit_run))), pixels[None], 1)
    np.testing.assert_allclose(names["features"], wanted, rtol=1e-4, atol=1e-4)


def test_the_best_weights_can_be_kept(cached_store, tmp_path):
    run_distill(cached_store, KEY, student(), tmp_path / "run", settings(keep="best"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert record["result"]["kept_step"] == best["step"] == record["result"]["outcome"]["best_step"]
    kept = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(
        torch.equal(kept[n.removeprefix("student.network.")], t) for n, t in best["model"].items() if "network" in n
    )


def test_the_page_of_curves(vit_run):
    page = (vit_run / "curves.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "CKA, debiased" in page
    assert Path(vit_run / "validation.csv").exists()
