"""The package, its citation and its image: what is built holds what the documents promise."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib import import_module

import pytest

from tests.documents import ROOT, commands, shell_blocks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = ROOT / "Dockerfile"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of what a clone holds."""
    source, out = tmp_path_factory.mktemp("source") / "g2l", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("g2l_core", "pipeline"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--wheel-dir", out, source], check=True, env=environment, cwd=out)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_all_that_is_not_python(wheel):
    names = set(wheel.namelist())
    for package in ("g2l_core", "pipeline"):
        kept = [path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()]
        assert {name for name in kept if "__pycache__" not in name} <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"g2l_core", "pipeline"}
    assert "g2l_core/py.typed" in names
    for example in ("oscc/tasks.toml", "crc/labels.csv", "slurm/distill.sbatch", "nextflow/main.nf"):
        assert wheel.read(f"pipeline/examples/{example}") == (ROOT / "docs" / "examples" / example).read_bytes()
    assert any(re.fullmatch(r"g2l-.*\.dist-info/licenses/LICENSE", name) for name in names)


def test_the_wheel_says_what_it_is(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    facts = HeaderParser().parsestr(wheel.read(name).decode())
    assert (facts["Name"], facts["License-Expression"]) == ("g2l", "Apache-2.0")
    assert facts["Author"] == "The G2L contributors"
    known = import_module("trove_classifiers").classifiers
    assert set(facts.get_all("Classifier")) <= known
    assert "Typing :: Typed" in facts.get_all("Classifier")
    assert "knowledge distillation" in facts["Keywords"].split(",")
    assert "Programming Language :: Python :: 3.11" in facts.get_all("Classifier")
    (scripts,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    module, function = re.search(r"^g2l = (\S+):(\S+)$", wheel.read(scripts).decode(), re.MULTILINE).groups()
    assert f"{module.replace('.', '/')}.py" in wheel.namelist()
    assert callable(getattr(import_module(module), function))


def test_the_citation_is_one():
    """Against the schema of the Citation File Format 1.2.0."""
    yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "tests" / "data" / "cff-1.2.0.schema.json").read_text(encoding="utf-8"))
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = yaml.safe_load(text)
    jsonschema.validate(cited, schema)
    assert cited["license"] == PROJECT["license"]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert {each["url"] for each in cited["references"]} == set(PROJECT["urls"].values())
    for wrong in ({"authors": []}, {"cff-version": "9"}, {"licence": "Apache-2.0"}, {"date-released": "2026-11"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(cited | wrong, schema)


def instructions():
    """The Dockerfile's instructions with their arguments, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]


def test_the_image_is_built_from_the_wheel_for_a_user_without_rights():
    found = instructions()
    assert {name for name, _ in found} <= {
        "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name, rest in found:
        if name == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, f"{source} does not get to the builder"
    everything = "\n".join(rest for _, rest in found)
    for argument in (rest.partition("=")[0] for name, rest in found if name == "ARG"):
        assert re.search(rf"\$\{{?{argument}\b", everything), f"{argument} is not used"
    assert "latest" not in everything
    assert "-e ." not in everything
    assert [rest for name, rest in found if name == "USER"] == ["1000"]
    assert json.loads(next(rest for name, rest in found if name == "ENTRYPOINT")) == ["g2l"]
    extras = re.search(r'EXTRAS="(.*)"', everything)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    for package in ("torch", "torchvision"):
        (wanted,) = (each for each in PROJECT["dependencies"] if re.match(rf"{package}\b", each))
        assert f'"{wanted}"' in everything, f"the Dockerfile and pyproject.toml want other versions of {package}"


def test_the_image_passes_its_linter():
    if not shutil.which("hadolint"):
        pytest.skip("needs hadolint")
    subprocess.run(["hadolint", DOCKERFILE], check=True)
    wrong = DOCKERFILE.read_text(encoding="utf-8").replace("USER 1000", "USER root")
    assert subprocess.run(["hadolint", "-"], input=wrong, text=True, capture_output=True, check=False).returncode


def builder():
    """Docker or podman, if one of them can build here."""
    for program in ("docker", "podman"):
        if shutil.which(program) and not subprocess.run([program, "info"], capture_output=True, check=False).returncode:
            return program
    return None


@pytest.mark.slow
def test_the_image_builds_and_answers():
    program = builder()
    if program is None:
        pytest.skip("needs docker or podman")
    subprocess.run([program, "build", "-t", "g2l:test", "--build-arg", "EXTRAS=demo", ROOT], check=True)
    told = subprocess.run([program, "run", "--rm", "g2l:test", "--version"], check=True, capture_output=True, text=True)
    assert told.stdout.startswith("g2l ")


def test_packages_for_a_machine_without_internet():
    """The options of the page are those of pip, and the extras those of G2L."""
    page = ROOT / "docs" / "howto" / "offline.md"
    lines = [words for block in shell_blocks(page) for words in commands(block.text) if words[0] == "pip"]
    assert [words[1] for words in lines] == ["wheel", "download", "install"]
    for _, command, *arguments in lines:
        parser = import_module("pip._internal.commands").create_command(command).parser
        options, what = parser.parse_args(arguments)
        (wanted,) = what
        named = re.search(r"\[(.*)\]", wanted)
        assert set((named[1] if named else "onnx").split(",")) <= set(PROJECT["optional-dependencies"])
        if command == "download":
            assert options.download_dir == "wheels"
            assert options.platforms
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name for row in table for name in re.findall(r"\w+", row)}
    assert told == set(PROJECT["optional-dependencies"]) - {"docs", "test", "dev"}
