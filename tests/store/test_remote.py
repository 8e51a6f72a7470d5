"""Stores at addresses: what is read equals what is in the folder, whatever happens on the way."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import g2l_core as g2l
from g2l_core.errors import (
    StoreCorruptError,
    StoreError,
    StoreMismatchError,
    StoreMissingError,
    UsageError,
)
from g2l_core.store import remote
from g2l_core.store.arrays import dask_features
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore
from g2l_core.store.location import locate
from g2l_core.store.tables import Shard
from g2l_core.store.upload import upload
from g2l_core.store.verify import verify
from pipeline.cli.main import app
from tests.servers import CuttingProxy, serving
from tests.store.toy import ENCODER, create, features_of, fill, lay, put_features

pytest.importorskip("obstore", reason="needs obstore (extra remote)")
HARD_ID = "center 1/ä#1 50%+x"


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def toy(tmp_path, small_shards):
    """Slides of 40 rows, three shards a view, one of them nested under an id that addresses must escape."""
    store = create(tmp_path / "folder" / "toy.zarr")
    status = np.zeros(40, np.uint8)
    status[[3, 20]] = 1
    fill(lay(store, "a", n=40), status=status)
    fill(lay(store, HARD_ID, n=40, labels={"patient_id": "p2"}))
    store.fail_slide("b", "/b.svs", "no tissue", {"patient_id": "p3"})
    store.save_catalogue()
    return store


@pytest.fixture
def uploaded(toy, bucket):
    assert [file.is_new for file in upload(toy, f"{bucket}/x/toy.zarr")][-1]
    return f"{bucket}/x/toy.zarr"


@pytest.fixture
def web(toy):
    with serving(toy.path.parent) as server:
        yield server


def require_equal(there: FeatureStore, here: FeatureStore):
    """Refuse a store that gives anything else than another one."""
    assert there.facts == here.facts
    assert there.slide_ids() == here.slide_ids()
    assert there.failed_slides() == here.failed_slides()
    for slide, other in zip(there.slides(), here.slides(), strict=True):
        assert (slide.slide_id, slide.facts) == (other.slide_id, other.facts)
        for name in ("coords", "patch_status", "view_params", "pixel_hash"):
            np.testing.assert_array_equal(getattr(slide, name), getattr(other, name))
        np.testing.assert_array_equal(there.good_by_block(slide), here.good_by_block(other))
        for view in range(slide.n_views):
            np.testing.assert_array_equal(slide.features(ENCODER, view=view), other.features(ENCODER, view=view))
            np.testing.assert_array_equal(
                slide.read_rows(ENCODER, 5, 22, view=view), other.read_rows(ENCODER, 5, 22, view=view)
            )
    assert list(map(str, verify(there))) == list(map(str, verify(here)))


# -- the same as in the folder --------------------------------------------------------------------------------


def test_a_bucket_gives_what_the_folder_gives(toy, uploaded):
    require_equal(FeatureStore.open(uploaded), toy)


def test_a_plain_web_server_gives_what_the_folder_gives(toy, web):
    require_equal(FeatureStore.open(f"{web.url}/toy.zarr/"), toy)
    assert not [path for path in web.asked if path.endswith("/")]  # nothing was listed


def test_google_s_address_gives_what_the_folder_gives(toy, uploaded, google_bucket):
    require_equal(FeatureStore.open(uploaded.replace("s3://bucket", google_bucket)), toy)


def test_a_cohort_of_an_address_is_that_of_the_folder(toy, uploaded, web, tmp_path):
    here = g2l.open(toy.path)
    for address in (uploaded, f"{web.url}/toy.zarr"):
        there = g2l.open(address)
        assert repr(there) == repr(here)
        assert there.patches().equals(here.patches())
        np.testing.assert_array_equal(there.numpy(ENCODER), here.numpy(ENCODER))
        copy = there.copy(tmp_path / f"{address.partition(':')[0]}.zarr")
        np.testing.assert_array_equal(copy.numpy(ENCODER), here.numpy(ENCODER))


def test_what_is_sent_to_another_process_reads_there(toy, uploaded):
    slide = FeatureStore.open(uploaded).slide("a")
    slide.features(ENCODER)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(slide)).features(ENCODER), toy.slide("a").features(ENCODER))
    lazy = dask_features(FeatureStore.open(uploaded), ENCODER)
    np.testing.assert_array_equal(lazy.compute(), dask_features(toy, ENCODER).compute())


def test_a_bucket_is_read_as_it_is_and_not_as_its_catalogue_says(toy, uploaded, monkeypatch):
    read = list[str]()
    whole = remote.Connection.read
    monkeypatch.setattr(remote.Connection, "read", lambda self, key: read.append(key) or whole(self, key))
    store = FeatureStore.open(uploaded)
    for _ in range(3):
        assert store.slide_ids() == ["a", "b", HARD_ID]
    # all documents of slides are as the catalogue has them
    assert [key for key in read if key.startswith("slides/")] == ["slides/center 1/zarr.json"]

    writable = FeatureStore.open(toy.path, writable=True).slide("a")
    writable.set_labels({"patient_id": "p9"})  # of the same length
    locate(uploaded).connection.put("slides/a/zarr.json", (writable.folder / "zarr.json").read_bytes())
    assert FeatureStore.open(uploaded).slide("a").labels == {"patient_id": "p9"}
    locate(uploaded).connection.put("slides/a/zarr.json", b"{")
    store = FeatureStore.open(uploaded)
    assert list(store.damaged) == ["a"]
    assert [slide.slide_id for slide in store.slides()] == [HARD_ID]


def test_what_changed_since_the_catalogue_or_the_listing_is_read_anew(toy, uploaded, web):
    """The facts that a reader has are old: the checksums tell, and the slide's document has the new ones."""
    opened = FeatureStore.open(uploaded)
    assert opened.slide_ids()
    slide = FeatureStore.open(toy.path, writable=True).slide("a")
    values = features_of("other", 40, 1)[:, 0]
    put_features(slide, ENCODER, values, view=1)
    slide.put_table("coords", slide.coords + 1)
    for store in (opened, FeatureStore.open(f"{web.url}/toy.zarr")):
        if store is opened:
            for file in upload(FeatureStore.open(toy.path), uploaded):
                assert file.is_new == (file.key.endswith((".1.0", "coords/c.0.0", "a/zarr.json")) and "/a/" in file.key)
        old = store.slide("a")
        assert old.facts != slide.facts
        np.testing.assert_array_equal(old.features(ENCODER, view=1), values)
        np.testing.assert_array_equal(old.coords, slide.coords)
        assert old.facts == slide.facts


# -- what goes wrong on the way -------------------------------------------------------------------------------


def test_cut_connections_are_tried_again(toy, web):
    web.cuts = 1000  # each file once
    require_equal(FeatureStore.open(f"{web.url}/toy.zarr"), toy)
    assert len(web.was_cut) > 20


def test_cut_connections_to_a_bucket_are_tried_again(toy, uploaded, bucket_server, monkeypatch):
    proxy = CuttingProxy(bucket_server, after=400)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    for _ in range(3):
        proxy.cuts = 3
        require_equal(FeatureStore.open(uploaded), toy)
        assert proxy.cuts == 0
    proxy.close()


def test_a_busy_server_is_asked_again_and_a_silent_one_is_left(toy, web, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 0.2)
    web.busy, web.silent = 3, 1
    require_equal(FeatureStore.open(f"{web.url}/toy.zarr"), toy)
    web.busy = 1000
    with pytest.raises(
        StoreError, match=r"cannot read http.*toy.zarr/zarr.json: .*503.*5 tries.* run the same"
    ) as refused:
        FeatureStore.open(f"{web.url}/toy.zarr")
    assert not isinstance(refused.value, StoreCorruptError)


def test_a_lost_network_is_no_damage(toy, web):
    store = FeatureStore.open(f"{web.url}/toy.zarr")
    slide = store.slide("a")
    slide.features(ENCODER)
    web.status = 500
    for read in (lambda: slide.features(ENCODER), lambda: slide.coords, lambda: list(verify(store))):
        with pytest.raises(StoreError, match="Check the network") as refused:
            read()
        assert not isinstance(refused.value, StoreCorruptError)


@pytest.mark.parametrize(
    ("status", "words"), [(403, "access is denied"), (401, "access is denied"), (400, "Check the address")]
)
def test_a_refusal_is_not_tried_again(web, status, words, monkeypatch):
    web.status = status
    with pytest.raises(StoreError, match=words):
        FeatureStore.open(f"{web.url}/toy.zarr")
    assert sum(web.asked.values()) == 1
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "ENDPOINT_URL": web.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(StoreError, match=f"{words}.*" + ("AWS_ACCESS_KEY_ID" if status != 400 else "region")):
        FeatureStore.open("s3://bucket/toy.zarr")


def test_absent_credentials_are_named(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="there are no credentials. Set AWS_ACCESS_KEY_ID"):
        FeatureStore.open("s3://bucket/toy.zarr")


def test_what_is_absent_is_named(toy, uploaded, web):
    with pytest.raises(StoreMissingError, match=r"there is no store at s3://bucket/y\.zarr; g2l store upload"):
        FeatureStore.open("s3://bucket/y.zarr")
    with pytest.raises(StoreMissingError, match="no bucket other"):
        FeatureStore.open("s3://other/y.zarr")
    with pytest.raises(StoreMissingError, match=rf"there is no store at {web.url}/y\.zarr"):
        FeatureStore.open(f"{web.url}/y.zarr")
    shard, gone = Shard(16, 32, 1), "slides/a/features/toy/c.1.1.0"
    locate(uploaded).connection.delete(gone)
    (toy.path / gone).unlink()
    for address, what in ((uploaded, "its file is absent"), (f"{web.url}/toy.zarr", "recorded 16 of")):
        store = FeatureStore.open(address)
        (found,) = (problem for problem in verify(store) if problem.kind == "damaged")
        assert (found.slide_id, found.encoder, found.shard) == ("a", ENCODER, shard)
        assert what in found.what
        with pytest.raises((StoreCorruptError, StoreMissingError), match="slide a"):
            store.slide("a").features(ENCODER, view=1)
        store.slide("a").features(ENCODER)


def test_a_changed_object_is_damage(toy, uploaded, web):
    for name in ("coords/c.0.0", "features/toy/c.0.0.0", "zarr.json"):
        file = toy.path / "slides/a" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
        locate(uploaded).connection.put(f"slides/a/{name}", bytes(content))
        for address in (uploaded, f"{web.url}/toy.zarr"):
            damaged = [problem for problem in verify(FeatureStore.open(address)) if problem.kind == "damaged"]
            assert {problem.slide_id for problem in damaged} == {"a"}


def test_a_web_server_needs_the_catalogue_and_parts_of_files(toy, web):
    slide = FeatureStore.open(f"{web.url}/toy.zarr").slide("a")
    web.has_parts = False
    with pytest.raises(StoreError, match="does not send parts of files"):
        slide.read_rows(ENCODER, 5, 7, view=0)
    (toy.path / ".catalogue/slides.jsonl").unlink()
    with pytest.raises(StoreError, match=r"slides.jsonl is absent or damaged.*verify --repair"):
        FeatureStore.open(f"{web.url}/toy.zarr")


def test_without_the_extra_the_message_names_it(monkeypatch, toy):
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "obstore", None)
    for address in ("s3://bucket/x.zarr", "https://host/x.zarr"):
        with pytest.raises(UsageError, match=r'needs obstore: pip install "g2l\[remote\]"'):
            FeatureStore.open(address)
    FeatureStore.open(toy.path).slide("a").features(ENCODER)


def test_folders_are_read_without_the_extra(toy):
    code = (
        "import sys; from g2l_core.store.features import FeatureStore as F; next(F.open(sys.argv[1]).slides()).coords"
    )
    code += "; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", SMALL_SHARDS + code, toy.path], check=False).returncode == 0


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/x.zarr", "address of s3://, gs://, https://, http://"),
        ("az://container/x.zarr", "address of s3://"),
        ("file:///x.zarr", "address of s3://"),
        ("s3://", "names no bucket"),
        ("https://me:secret@host/x.zarr", "leave it out"),
        ("https://host/x.zarr?signature=secret", r"has no \? or #"),
        ("s3://bucket/x#1.zarr", r"has no \? or #"),
    ],
)
def test_other_addresses_are_refused(address, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=words) as refused:
        FeatureStore.open(address)
    assert "secret" not in str(refused.value)
    told = CliRunner().invoke(app, ["store", "info", address])
    assert isinstance(told.exception, StoreError)
    assert not list(tmp_path.iterdir())


def test_an_address_is_not_written_to(uploaded, web):
    for address in (uploaded, f"{web.url}/toy.zarr"):
        store = FeatureStore.open(address)
        for write in (
            lambda address=address: FeatureStore.open(address, writable=True),
            lambda address=address: FeatureStore.create(address, grid={}, views={}),
            lambda store=store: store.add_encoder("other", EncoderFacts(digest="1", dim=2)),
            lambda store=store: store.remove_slide("a"),
            lambda store=store: store.slide("a").set_labels({}),
            lambda store=store: store.slide("a").drop_encoder(ENCODER),
            lambda address=address: g2l.open(address).write_column("score", np.zeros(80)),
        ):
            with pytest.raises(StoreError):
                write()
    assert not Path("s3:").exists()


SMALL_SHARDS = "from g2l_core.store import schema; schema.SHARD_ROWS, schema.CHUNK_ROWS = 16, 4\n"
FORKED = """
import os, sys
from g2l_core.store.features import FeatureStore
slide = FeatureStore.open(sys.argv[1]).slide("a")
slide.features("toy")
if os.fork() == 0:
    try:
        slide.features("toy", view=1)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    try:
        FeatureStore.open(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_forked_process_is_refused_and_does_not_wait_forever(web):
    run = subprocess.run(
        [sys.executable, "-c", SMALL_SHARDS + FORKED, f"{web.url}/toy.zarr"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.count("StoreError") == run.stdout.count('by "spawn"') == 2


# -- uploads --------------------------------------------------------------------------------------------------


class CutOffError(Exception):
    """Stands for a process that ends."""


@pytest.mark.parametrize("n", [0, 1, 7, 20, 33, 38, 39, 40, 41])
def test_an_upload_that_ends_anywhere_goes_on(toy, bucket, n, monkeypatch):
    """A reader finds no store, or all of it; run again, everything is there, and nothing is sent twice."""
    address, done = f"{bucket}/toy.zarr", []
    put = remote.Connection.put

    def put_some(self, key, content):
        if len(done) == n:
            raise CutOffError
        done.append(key)
        return put(self, key, content)

    monkeypatch.setattr("g2l_core.store.upload.UPLOADS", 1)
    monkeypatch.setattr(remote.Connection, "put", put_some)
    try:
        list(upload(toy, address))
    except CutOffError:
        try:
            require_equal(FeatureStore.open(address), toy)
        except StoreMissingError:
            assert "zarr.json" not in done
    first = set(done)
    monkeypatch.setattr(remote.Connection, "put", put)
    sent = {file.key for file in upload(toy, address) if file.is_new}
    assert not sent & first
    require_equal(FeatureStore.open(address), toy)
    files = {p.relative_to(toy.path).as_posix() for p in toy.path.rglob("*") if p.is_file()}
    assert set(locate(address).connection.listing.objects) == {f for f in files if not f.startswith(".locks")}


def test_only_what_is_new_is_sent(toy, uploaded):
    assert not [file.key for file in upload(toy, uploaded) if file.is_new]
    store = FeatureStore.open(toy.path, writable=True)
    store.slide("a").set_labels({"patient_id": "p9"})
    fill(lay(store, "d", n=5))
    sent = {file.key for file in upload(FeatureStore.open(toy.path), uploaded) if file.is_new}
    assert {key.split("/")[1] for key in sent} == {"a", "d"}
    assert {key for key in sent if key.startswith("slides/a/")} == {"slides/a/zarr.json"}
    require_equal(FeatureStore.open(uploaded), FeatureStore.open(toy.path))


def test_nothing_else_is_written_over(toy, uploaded, bucket, tmp_path, monkeypatch):
    other = create(tmp_path / "other.zarr", max_patches=7)
    with pytest.raises(StoreMismatchError, match=r"another store is at s3://bucket/x/toy\.zarr: .*max_patches"):
        list(upload(other, uploaded))
    with pytest.raises(StoreMismatchError, match=r"holds something else, such as toy\.zarr/"):
        list(upload(other, f"{bucket}/x"))
    sending = upload(toy, f"{bucket}/begun")
    next(sending)
    sending.close()
    with pytest.raises(StoreMismatchError, match="another store is at"):
        list(upload(other, f"{bucket}/begun"))
    for address, words in ((f"{tmp_path}/x", "is a folder"), ("https://host/x", "only read from")):
        with pytest.raises(StoreError, match=words):
            list(upload(toy, address))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="cannot list s3://bucket/y"):
        list(upload(toy, f"{bucket}/y"))


def test_a_store_that_is_killed_while_it_is_uploaded_goes_on(toy, bucket):
    address = f"{bucket}/toy.zarr"
    command = [sys.executable, "-m", "pipeline.cli", "store", "upload", str(toy.path), address]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(locate(address).connection.listed().objects) < 5:
        pass
    running.kill()
    running.wait()
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "were there already" in told.stdout
    shutil.rmtree(toy.path / ".locks", ignore_errors=True)
    require_equal(FeatureStore.open(address), toy)


# -- commands -------------------------------------------------------------------------------------------------


def test_commands_read_addresses(toy, uploaded, web, tmp_path):
    def told(*arguments):
        run = CliRunner().invoke(app, ["store", *map(str, arguments)], catch_exceptions=False)
        return run.exit_code, run.stdout

    for address in (uploaded, f"{web.url}/toy.zarr"):
        assert told("ls", address) == told("ls", toy.path)
        assert address in told("info", address)[1]
        here = [line for line in told("verify", toy.path)[1].splitlines() if not line.startswith("next:")]
        assert told("verify", address) == (1, "\n".join([*here, ""]).replace(str(toy.path), address))
        out = tmp_path / address.partition(":")[0]
        told("export", address, "--out", out, "--format", "npy")
        np.testing.assert_array_equal(
            np.sort(np.load(next(out.rglob("*.npy"))), axis=0),
            np.sort(
                np.concatenate(
                    [
                        features_of("a", 40, 2)[[r for r in range(40) if r not in (3, 20)], 0],
                        features_of(HARD_ID, 40, 2)[:, 0],
                    ]
                ),
                axis=0,
            ),
        )
        assert told("subset", address, out / "copy.zarr", "--where", "patient_id=p2")[0] == 0
        assert [s.slide_id for s in FeatureStore.open(out / "copy.zarr").slides()] == [HARD_ID]
    assert told("du", uploaded) == told("du", toy.path)
    with pytest.raises(StoreError, match="nothing can be listed"):
        told("du", f"{web.url}/toy.zarr")
