"""Where the real data lies, the hypothesis profiles, and run-time checks of array shapes."""

import json
import os
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

from threadpoolctl import threadpool_limits

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two threads of each of two workers on two cores wait for each other. The variable is for libraries that are not
    # loaded yet and for the processes that tests start; plugins have loaded NumPy's by now.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threadpool_limits(1)

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# An int is a fine float, for type checkers and here.
install_import_hook("g2l_core", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("quick", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

collect_ignore = ["benchmarks"]  # programs, which collecting examples would import

DATA_VARIABLE = "G2L_TEST_DATA"
"""Names the folder of the real slides and patches; tests/data/README.md says what is in it and where to get it."""

BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data"


def _real_data(relative: str) -> Path:
    path = Path(os.environ.get(DATA_VARIABLE, BESIDE_CHECKOUT)) / relative
    if not path.exists():
        pytest.skip(
            f"needs the real data {relative}: set {DATA_VARIABLE} to a folder that has it (tests/data/README.md)"
        )
    return path


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """A real Aperio slide: 2220 x 2967 px, 0.499 um/px, one level, 240 px JPEG tiles."""
    return _real_data("slides/CMU-1-Small-Region.svs")


@pytest.fixture(scope="session")
def slide_without_mpp() -> Path:
    """A real Aperio JPEG2000 slide whose header gives no um/px and no objective power."""
    return _real_data("slides/tcga-cr-7395-01a-01-ts1.svs")


@pytest.fixture(scope="session")
def oscc_patches() -> Path:
    """1,224 real oral-mucosa patches of 224 px in `train|test/Normal|OSCC`."""
    return _real_data("patches/oscc-rahman")


@pytest.fixture(scope="session")
def crc_patches() -> Path:
    """70 real colorectal patches of 224 px at 0.5 um/px, `CLASS___*.jpg`, ten of each of seven classes."""
    return _real_data("patches/crc-val-he-7k-sample")


TEACHER = "timm:mobilenetv3_small_050@64"
"""Stands in for a teacher in tests of wiring: a real architecture with seeded random weights."""


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """The manifest of six small drawn slides, two centers; slides/ and truth/ lie beside it."""
    from g2l_core.synthetic.cohort import CohortSpec, draw_cohort

    return draw_cohort(tmp_path_factory.mktemp("cohort"), CohortSpec(patients=6, size_um=(768.0, 768.0)))


@pytest.fixture(scope="session")
def cached_store(cohort, tmp_path_factory) -> Path:
    """A store of that cohort with two augmented views of `TEACHER`. Not to be changed: copy it first."""
    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.patches.grid import GridSpec
    from g2l_core.patches.views import ViewSpec
    from pipeline.cache_teacher import run_extraction
    from pipeline.extract import ExtractionSettings

    path = tmp_path_factory.mktemp("cached") / "store.zarr"
    teacher = resolve_encoder(TEACHER, weights="random:0")
    run_extraction([cohort], path, [teacher], GridSpec(), ViewSpec(), ExtractionSettings(batch_size=16))
    return path


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[int]:
    """The port of an S3 server."""
    moto = pytest.importorskip("moto.server", reason="needs moto (extra test)")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(bucket_server, monkeypatch) -> str:
    """The address of a new bucket, for which the environment is set."""
    url = f"http://127.0.0.1:{bucket_server}"
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", method=method)).close()
    return "s3://bucket"


@pytest.fixture
def google_bucket(bucket, bucket_server, tmp_path, monkeypatch) -> Iterator[str]:
    """The same bucket at an address of Google's storage, where anybody may read and write."""
    from tests.servers import GoogleProxy

    proxy = GoogleProxy(bucket_server)
    anybody = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::bucket*"]}
    client = pytest.importorskip("boto3").client("s3", endpoint_url=f"http://127.0.0.1:{bucket_server}")
    client.put_bucket_policy(Bucket="bucket", Policy=json.dumps({"Version": "2012-10-17", "Statement": [anybody]}))
    client.close()
    nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
    account = {"gcs_base_url": proxy.url, "disable_oauth": True, **nobody}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    yield "gs://bucket"
    proxy.close()
