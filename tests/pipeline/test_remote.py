"""Commands on a store behind a web server give what they give on its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import g2l_core as g2l
from g2l_core.report.write import read_report
from g2l_core.store import remote
from g2l_core.store.features import FeatureStore
from pipeline.bench import run_bench
from pipeline.distill import DistillHow, run_distill
from pipeline.recompute import recompute
from tests.pipeline.test_distill import KEY, settings, student
from tests.planted import make_store, patch_labels, write_labels
from tests.servers import serving
from tests.test_docs import python_blocks

pytest.importorskip("obstore", reason="needs obstore (extra remote)")

TASKS = """
[tasks.patches]
labels = "labels.csv"
label = "kind"
folds = 2
metrics = ["cka", "knn"]
"""


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


def test_a_benchmark_reads_an_address_and_leaves_out_what_is_damaged(tmp_path):
    store = make_store(tmp_path / "s.zarr", {"teacher": (1, 0), "student": (0.5, 0)})
    store.save_catalogue()
    write_labels(tmp_path / "labels.csv", patch_labels())
    (tmp_path / "tasks.toml").write_text(TASKS)

    def values(address, out):
        report = run_bench(tmp_path / "tasks.toml", [Path(address)], ["teacher", "student"], tmp_path / out)
        return read_report(tmp_path / out).results, report

    with serving(tmp_path) as server:
        server.cuts = 1000
        there, report = values(f"{server.url}/s.zarr", "there")
        assert there == values(tmp_path / "s.zarr", "here")[0]
        assert f"{server.url}/s.zarr (sha256" in json.dumps(dict(report.provenance))
        shutil.rmtree(tmp_path / "s.zarr/slides/s3/features")
        told = json.dumps(values(f"{server.url}/s.zarr", "damaged")[1].notes)
        assert "slide s3 is damaged and left out" in told


def test_other_processes_read_and_so_does_plain_zarr(cached_store):
    """What docs/remote.md shows."""
    from torch.utils.data import DataLoader

    with serving(cached_store.parent) as server:
        address = f"{server.url}/{cached_store.name}"
        batches = DataLoader(
            g2l.open(address).torch(KEY, shuffle=False),
            batch_size=None,
            num_workers=1,
            multiprocessing_context="spawn",
        )
        there = np.concatenate([batch["features"].numpy() for batch in batches])
        names = {"address": address}
        (block,) = python_blocks("remote.md")
        block = block.replace("h-optimus-0", KEY).replace("(address)", '(address, client_options={"allow_http": True})')
        exec(block, names)
        plain = names["features"][:, 0]
    assert len(there) == len(g2l.open(cached_store).patches())
    np.testing.assert_array_equal(np.sort(there, axis=0), np.sort(g2l.open(cached_store).numpy(KEY), axis=0))
    np.testing.assert_array_equal(plain, FeatureStore.open(cached_store).slide("p01-1").features(KEY))


def test_a_student_distilled_from_an_address_is_that_of_the_folder(cached_store, tmp_path):
    how = DistillHow(workers=1)
    run_distill(cached_store, KEY, student(), tmp_path / "here", settings(steps=4), how=how)
    with serving(cached_store.parent) as server:
        server.cuts = 1000
        address = f"{server.url}/{cached_store.name}"
        run_distill(Path(address), KEY, student(), tmp_path / "there", settings(steps=4), how=how)
        (again,) = recompute(FeatureStore.open(address), 5, seed=0, device="cpu")
    here, there = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("here", "there"))
    assert here.keys() == there.keys()
    for name, values in here.items():
        np.testing.assert_array_equal(there[name], values)
    assert json.loads((tmp_path / "there" / "run.json").read_text())["about"]["store"] == address
    assert (again.compared, again.problems) == (5, ())
