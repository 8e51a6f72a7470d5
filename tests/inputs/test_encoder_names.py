"""A stored encoder goes by what stage one took for it."""

import pytest

from g2l_core.encoders.resolve import find_stored
from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.store.facts import EncoderFacts


def stored(name, weights):
    return EncoderFacts(name=name, weights=weights, dim=4, digest=name)


KNOWN = {
    "build-1": stored("build", "module:lab.models:build"),
    "build-2": stored("build", "module:lab.others:build"),
    "build-448-3": stored("build@448+cls", "module:lab.models:build"),
    "mine-4": stored("mine", "file:w.safetensors"),
    "timm-resnet10t-random0": stored("timm:resnet10t", "random:0"),
}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("lab.models:build", "build-1"),
        ("lab.others:build", "build-2"),
        ("lab.models:build@448+cls", "build-448-3"),
        ("build-2", "build-2"),
        ("timm:resnet10t", "timm-resnet10t-random0"),
        ("mine", "mine-4"),
    ],
)
def test_the_name_that_stage_one_took(text, key):
    assert find_stored(text, KNOWN) == key


def test_a_spec_file_names_its_encoder(tmp_path):
    (tmp_path / "my.toml").write_text(
        'name = "mine"\narchitecture = "resnet10t"\nweights = "random:0"\ninput_px = 64\n'
        "mean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
    )
    assert find_stored(str(tmp_path / "my.toml"), KNOWN) == "mine-4"


def test_names_that_fit_none_or_several():
    with pytest.raises(UnknownNameError):
        find_stored("lab.models:other", KNOWN)
    with pytest.raises(UsageError, match="fits several stored encoders: build-1, build-2"):
        find_stored("build", KNOWN)
