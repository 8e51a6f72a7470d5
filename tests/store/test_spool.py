"""Stores that are written at an address: readers see whole slides alone, and whatever happens, the work goes on."""

import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from g2l_core.errors import (
    StoreCorruptError,
    StoreError,
    StoreMismatchError,
    StoreMissingError,
    UsageError,
)
from g2l_core.store import address_lock, remote
from g2l_core.store.address_lock import LOCK, locked_address
from g2l_core.store.features import FeatureStore
from g2l_core.store.hollow import is_hollow
from g2l_core.store.location import locate
from g2l_core.store.upload import upload
from g2l_core.store.verify import verify
from pipeline import spool
from pipeline.interruption import what_is_left
from pipeline.settings import SpoolSettings
from pipeline.spool import at_place, spool_of, told_place
from tests.pipeline.test_broken_inputs import remount, small_disk
from tests.servers import CuttingProxy, serving
from tests.store.test_remote import HARD_ID, SMALL_SHARDS, require_equal
from tests.store.toy import ENCODER, create, fill, lay, work

pytest.importorskip("obstore", reason="needs obstore (extra remote)")


@pytest.fixture(autouse=True)
def quick(monkeypatch, small_shards):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(spool, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(spool, "TRY_AGAIN_S", 0.02)


@pytest.fixture
def address(bucket):
    return f"{bucket}/x/toy.zarr"


@pytest.fixture
def here(tmp_path):
    return SpoolSettings(spool=tmp_path / "spool")


def objects(address):
    return locate(address).connection.listed().objects


def require_sound(address):
    """Whoever reads the address finds no store, or whole slides."""
    with suppress(StoreMissingError):
        assert not list(verify(FeatureStore.open(address)))


def shards_of(store):
    return sorted(path for path in Path(store).rglob("c.*") if "features" in path.parts)


def eventually(true):
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come true in 10 s")


# -- what is sent -----------------------------------------------------------------------------------------------


def test_slides_are_sent_once_they_are_whole_and_in_the_end_all_is_there(address, here):
    settings = SpoolSettings(spool=here.spool, keep_spool=True)
    with at_place(Path(address), settings) as folder:
        assert folder == here.spool / "toy.zarr"
        assert objects(address).keys() == {LOCK}
    with at_place(Path(address), settings, meanwhile=True) as folder:
        work(folder, ["a"])
        store = FeatureStore.open(folder, writable=True)
        half = lay(store, HARD_ID, n=40)
        store.fail_slide("b", "/b.svs", "no tissue", {"patient_id": "p3"})
        eventually(lambda: "slides/b/zarr.json" in objects(address))
        there = FeatureStore.open(address)
        assert there.slide_ids() == ["a", "b"]
        assert [problem.kind for problem in verify(there)] == ["failed"]
        assert "whole slides at s3://bucket/x/toy.zarr: 2; what else is done is in the spool" in what_is_left()
        fill(half)
    require_equal(FeatureStore.open(address), FeatureStore.open(folder))
    with at_place(Path(address), settings) as folder:
        late = lay(FeatureStore.open(folder, writable=True), "late", n=40)
    assert FeatureStore.open(address).slide("late").facts == late.facts  # not whole: nobody may take it for absent
    assert LOCK not in objects(address)
    assert ".catalogue/slides.jsonl" in objects(address)


def test_what_is_there_is_neither_done_nor_sent_nor_kept_again(address, here, monkeypatch):
    assert len(with_work(address, here)) == 12
    files = shards_of(here.spool)
    assert len(files) == 12
    assert all(is_hollow(path) and path.stat().st_size > 100 and path.stat().st_blocks == 0 for path in files)
    (found, *_) = verify(FeatureStore.open(here.spool / "toy.zarr"))
    assert (found.kind, "only at the address" in found.what) == ("missing", True)
    require_sound(address)

    sent, read = logged(monkeypatch)
    assert with_work(address, here) == []
    assert not [key for key in sent if key.startswith("slides/")]
    shutil.rmtree(here.spool)  # as on another machine
    read.clear()
    assert with_work(address, here) == []
    assert not [key for key in sent if key.startswith("slides/")]
    assert not [key for key in read if "/features/" in key and "/c." in key]
    assert with_work(address, here, ["a", HARD_ID, "d"]) == [f"d {i}.{view}" for i in range(3) for view in (0, 1)]
    assert {key.split("/")[1] for key in sent if key.startswith("slides/")} == {"d"}
    sent.clear()
    other = with_work(address, here, ["a"], encoder="other")
    assert len(other) == 6
    assert {key.split("/")[3] for key in sent if "/features/" in key and "/c." in key} == {"other"}
    there = FeatureStore.open(address)
    assert [problem.what for problem in verify(there)] == ["no features yet", "no features yet"]
    assert set(there.encoders) == {ENCODER, "other"}


def with_work(address, settings, slide_ids=("a", HARD_ID), **changes):
    with at_place(Path(address), settings, meanwhile=True) as folder:
        return work(folder, slide_ids, **changes)


def logged(monkeypatch):
    """The keys that are written and read from now on."""
    sent, read = list[str](), list[str]()
    put, get = remote.Connection.put, remote.Connection.read
    monkeypatch.setattr(
        remote.Connection, "put", lambda self, key, content: (sent.append(key), put(self, key, content))[1]
    )
    monkeypatch.setattr(remote.Connection, "read", lambda self, key: (read.append(key), get(self, key))[1])
    return sent, read


def test_google_s_address_is_written_to_as_well(google_bucket, here, tmp_path):
    address = f"{google_bucket}/x/toy.zarr"
    elsewhere = SpoolSettings(spool=tmp_path / "elsewhere")
    with at_place(Path(address), here, meanwhile=True) as folder:
        work(folder, ["a"])
        eventually(lambda: "slides/a/zarr.json" in objects(address))
        with locked_address(locate(f"{google_bucket}/y"), tmp_path / "y") as lock:
            assert lock.is_sure
        with pytest.raises(StoreError, match="another g2l command writes to gs://bucket/x/toy.zarr"):
            with_work(address, elsewhere)
        work(folder, [HARD_ID])
    there = FeatureStore.open(address)
    assert there.slide_ids() == ["a", HARD_ID]
    assert not list(verify(there))
    assert LOCK not in objects(address)
    written = with_work(address, elsewhere, ["a", "late"])  # from another machine
    assert {name.rpartition(" ")[0] for name in written} == {"late"}
    assert FeatureStore.open(address).slide_ids() == ["a", HARD_ID, "late"]


def test_what_another_machine_has_done_meanwhile_is_known(address, here, tmp_path):
    with_work(address, here, ["a"])
    elsewhere = SpoolSettings(spool=tmp_path / "elsewhere")
    with_work(address, elsewhere, ["d"])
    with_work(address, elsewhere, ["a"], encoder="other")
    assert with_work(address, here, ["a", "d"]) == []
    assert with_work(address, here, ["a"], encoder="other") == []
    assert FeatureStore.open(here.spool / "toy.zarr").slide("a").encoder_keys == ["other", ENCODER]


def test_features_that_are_read_again_are_fetched(address, here):
    with at_place(Path(address), here, meanwhile=True) as folder:
        store, status = create(folder), np.zeros(40, np.uint8)
        status[3] = 1
        values = fill(lay(store, "a", n=40), status=status)
        fill(lay(store, "b", n=40))
    with at_place(Path(address), here, reads_lost=True) as folder:
        np.testing.assert_array_equal(FeatureStore.open(folder).slide("a").features(ENCODER), values[:, 0])
        with pytest.raises(StoreCorruptError, match=r"slide b.*does not have the checksum"):
            FeatureStore.open(folder).slide("b").features(ENCODER)
    assert all(map(is_hollow, shards_of(folder)))


def test_what_was_deleted_at_the_address_is_done_again(address, here, bucket):
    with_work(address, here)
    with pytest.raises(StoreError, match="holds nothing but zeros: what was in it is at another address"):
        list(upload(FeatureStore.open(here.spool / "toy.zarr"), f"{bucket}/other.zarr"))
    locate(address).connection.delete("slides/a/features/toy/c.1.1.0")
    assert with_work(address, here) == ["a 1.1"]
    require_sound(address)


# -- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 3, 17, 30, 35])
def test_a_network_that_is_lost_costs_nothing_that_is_done(address, here, n, monkeypatch, capsys):
    sent, put = list[str](), remote.Connection.put

    def put_some(self, key, content):
        if len(sent) >= n and key != LOCK:
            raise StoreError("cannot write: no route to host")
        sent.append(key)
        return put(self, key, content)

    monkeypatch.setattr(remote.Connection, "put", put_some)
    with pytest.raises(StoreError, match="no route to host"):
        with_work(address, here)
    told = capsys.readouterr().err
    whole = sum(f"slides/{slide_id}/zarr.json" in sent for slide_id in ("a", HARD_ID))
    assert f"whole slides at {address}: {whole}; what else is done is in the spool {here.spool}" in told
    require_sound(address)
    monkeypatch.setattr(remote.Connection, "put", put)
    assert with_work(address, here) == []
    require_sound(address)
    assert FeatureStore.open(address).slide_ids() == ["a", HARD_ID]


def test_cut_connections_are_tried_again(address, here, bucket_server, monkeypatch):
    proxy = CuttingProxy(bucket_server, after=50)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    with at_place(Path(address), here, meanwhile=True) as folder:
        for n, slide_ids in enumerate((["a"], [HARD_ID]), start=1):
            proxy.cuts = 3
            work(folder, slide_ids)
            eventually(lambda n=n: sum(key.endswith("/pixel_hash/zarr.json") for key in objects(address)) == n)
        assert proxy.cuts == 0
        proxy.cuts = 3
    assert proxy.cuts == 0
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bucket_server}")
    require_sound(address)
    assert FeatureStore.open(address).slide_ids() == ["a", HARD_ID]


KILLED = """
import os, signal, sys
from pathlib import Path
from g2l_core.store.remote import Connection
from pipeline import spool
from pipeline.settings import SpoolSettings
from tests.store.toy import work

spool.LOOK_EVERY_S = 0.01
put, left = Connection.put, int(sys.argv[3])

def dying(self, key, content):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, key, content)

Connection.put = dying
with spool.at_place(Path(sys.argv[1]), SpoolSettings(spool=Path(sys.argv[2])), meanwhile=True) as folder:
    work(folder, sys.argv[4:])
"""


@pytest.mark.parametrize("n", [2, 16, 25])
def test_killed_at_any_moment_it_goes_on_here_and_elsewhere(address, here, tmp_path, n):
    command = [sys.executable, "-c", SMALL_SHARDS + KILLED, address, str(here.spool), str(n), "a", HARD_ID]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL
    require_sound(address)
    whole = [slide for slide in ("a", HARD_ID) if f"slides/{slide}/zarr.json" in objects(address)]
    elsewhere = SpoolSettings(spool=tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"another g2l command writes to .* \(on .*, since 20.*with --take-lock"):
        with_work(address, elsewhere)
    if n == 16:
        written = with_work(address, SpoolSettings(spool=elsewhere.spool, take_lock=True))
        assert not [name for name in written if name.rpartition(" ")[0] in whole]
    else:
        with_work(address, here)
    require_sound(address)
    assert FeatureStore.open(address).slide_ids() == ["a", HARD_ID]
    assert LOCK not in objects(address)


def test_a_disk_that_is_full_is_told_and_what_is_whole_is_sent(address, tmp_path, capsys):
    disk = tmp_path / "disk"
    with small_disk(disk, 260_000):
        settings, names = SpoolSettings(spool=disk), [f"s{i}" for i in range(6)]
        with pytest.raises(StoreError, match="free space and run the same command again"):
            with_work(address, settings, names)
        there = FeatureStore.open(address).slide_ids()
        assert f"whole slides at {address}: {len(there)};" in capsys.readouterr().err
        assert 0 < len(there) < 6
        require_sound(address)
        remount(disk, "size=4m")
        again = {name.partition(" ")[0] for name in with_work(address, settings, names)}
        assert not again.intersection(there)
    assert FeatureStore.open(address).slide_ids() == names
    require_sound(address)


def test_a_damaged_shard_is_not_sent(address, here):
    def damaging():
        with at_place(Path(address), here) as folder:
            work(folder, ["a", HARD_ID])
            path = shards_of(folder)[0]
            content = bytearray(path.read_bytes())
            content[5] ^= 1
            path.write_bytes(content)

    with pytest.raises(StoreCorruptError, match=r"slide a: "):
        damaging()
    path = shards_of(here.spool)[0]
    assert FeatureStore.open(address).slide_ids() == [HARD_ID]
    assert not is_hollow(path)


def test_a_command_that_fails_leaves_what_is_whole_at_the_address(address, here, capsys):
    def failing():
        with at_place(Path(address), here, meanwhile=True) as folder:
            work(folder, ["a"])
            raise UsageError("not so")

    with pytest.raises(UsageError, match="not so"):
        failing()
    assert f"whole slides at {address}: 1;" in capsys.readouterr().err
    assert FeatureStore.open(address).slide_ids() == ["a"]
    assert LOCK not in objects(address)


# -- who may write ----------------------------------------------------------------------------------------------


def test_one_command_at_a_time_writes_to_an_address(address, here, tmp_path, monkeypatch):
    elsewhere = SpoolSettings(spool=tmp_path / "elsewhere")

    def several():
        with at_place(Path(address), here) as folder:
            work(folder, ["a"])
            with pytest.raises(StoreError, match="in use: another g2l command sends from it"):
                with_work(address, here)
            with pytest.raises(StoreError, match="another g2l command writes to s3://bucket/x/toy.zarr"):
                with_work(address, elsewhere)
            time.sleep(1.1)  # stores are told apart by the second in which they were made
            with_work(address, SpoolSettings(spool=elsewhere.spool, take_lock=True), ["b"])
            locate(address).connection.put(LOCK, b'{"id": "x"}')

    with pytest.raises(StoreError, match="which took its lock over"):
        several()
    assert FeatureStore.open(address).slide_ids() == ["b"]
    locate(address).connection.delete(LOCK)
    with pytest.raises(StoreMismatchError, match="another store is at .*created.*give another --spool"):
        with_work(address, here, ["a"])


def test_of_two_at_once_one_gets_the_lock(address, tmp_path, monkeypatch):
    target, holder, looked = locate(address), address_lock._holder, [{}]
    with locked_address(target, tmp_path / "a"):  # which comes in between another one's look and its writing
        monkeypatch.setattr(address_lock, "_holder", lambda c: looked.pop() if looked else holder(c))
        with pytest.raises(StoreError, match="another g2l command writes to"), locked_address(target, tmp_path / "b"):
            pass


@pytest.mark.parametrize("answer", [None, True])
def test_a_server_without_conditions_is_told(address, here, answer, monkeypatch, capsys):
    monkeypatch.setattr(remote.Connection, "create", lambda self, key, content: (self.put(key, content), answer)[1])
    with_work(address, here, ["a"])
    assert "cannot keep a lock: let only one command at a time write there" in capsys.readouterr().err
    require_sound(address)


def test_what_cannot_be_written_to_is_refused_before_anything_is_done(bucket, here, tmp_path, monkeypatch):
    def refused(address, words, kind=StoreError, settings=here):
        with pytest.raises(kind, match=words), at_place(Path(address), settings):
            pytest.fail("the work has begun")

    refused("https://host/x.zarr", "a web server is only read from")
    refused("s3://absent/x.zarr", "there is no bucket absent")
    refused(tmp_path / "s.zarr", "is a folder: --spool, --keep-spool and --take-lock are for addresses", UsageError)
    with_work(f"{bucket}/x.zarr", here, ["a"])
    locate(f"{bucket}/z").connection.put("notes.txt", b"mine")
    refused(f"{bucket}/z", "holds no whole store")
    with serving(tmp_path) as web:
        monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
        web.status = 403
        refused(f"{bucket}/x.zarr", "access is denied. Set AWS_ACCESS_KEY_ID")
    assert not (here.spool / "z" / "zarr.json").exists()


def test_the_spool_lies_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = (spool_of(locate(f"s3://bucket/{name}/x.zarr"), SpoolSettings()) for name in ("a/b", "a-b"))
    assert one.parent.parent == other.parent.parent == tmp_path / "g2l" / "spool"
    assert one != other
    assert told_place(Path("s3:/bucket/x.zarr"), SpoolSettings(spool=Path("/d"))) == (
        "store: s3://bucket/x.zarr, through the spool /d/x.zarr"
    )
    assert told_place(Path("x.zarr"), SpoolSettings()) == ""
    assert not list(tmp_path.iterdir())
