"""Options made from the fields of specs: names, defaults, ranges, former names, and what a command gets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from g2l_core.options import MACHINE, build, entries, option
from pipeline.cli.options import from_specs
from pipeline.cli.reference import PAGE, reference
from pipeline.config import OPTIONS, check_option
from pipeline.settings import DistillSettings, ExtractionSettings, Recipe


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = option(0.5, min=0.1, help="The rate.")


@dataclass(frozen=True, kw_only=True)
class Toy:
    inner: Inner
    count: int = option(3, min=1, panel=MACHINE, help="How many.")
    colors: tuple[str, ...] = option(("red", "blue"), aliases=("colours",), parse=lambda t: t.split(","), help="Which.")
    where: tuple[str, ...] = option((), help="Conditions.")
    folder: Path | None = option(None, help="A folder.")
    draw: bool = option(True, help="Whether to draw.")
    quick: bool = option(False, help="Whether to hurry.")
    patience: int = option(10, name="stop", help="Steps.")
    secret: int = option(1, recipe_only=True, help="Rarely set.")
    fixed: int = 7
    """No option."""


def run(*arguments, **settings):
    """What a command that takes the toy gets, and what it prints."""
    got = []
    app = typer.Typer()

    @app.command()
    @from_specs(**settings)
    def command(toy: Toy, name: Annotated[str, typer.Option(help="A name.")] = "x"):
        got.append((toy, name))

    result = CliRunner().invoke(app, arguments)
    return (got[0] if got else None), result


def test_no_option_gives_the_spec_s_defaults():
    (toy, name), _ = run()
    assert (toy, name) == (Toy(inner=Inner()), "x")


def test_options_reach_the_fields_of_nested_specs():
    (toy, name), _ = run(
        *("--rate", "0.2", "--count", "5", "--colors", "red", "--where", "a=1", "--where", "b=2", "--folder", "f"),
        *("--no-draw", "--quick", "--stop", "4", "--secret", "2", "--name", "y"),
    )
    assert name == "y"
    assert toy == Toy(
        inner=Inner(rate=0.2), count=5, colors=("red",), where=("a=1", "b=2"), folder=Path("f"), draw=False, quick=True,
        patience=4, secret=2,
    )  # fmt: skip


def test_a_former_name_works_and_is_not_shown():
    (toy, _), _ = run("--colours", "green")
    assert toy.colors == ("green",)
    shown = run("--help")[1].output
    assert "--colors" in shown
    assert "red,blue" in shown
    assert "--colours" not in shown
    assert "--secret" not in shown
    assert "--fixed" not in shown


def test_a_value_out_of_range_is_refused():
    got, result = run("--count", "0")
    assert (got, result.exit_code) == (None, 2)
    assert "--count" in result.output


def test_a_command_leaves_options_out_and_has_defaults_of_its_own():
    (toy, _), _ = run(without=("quick",), count=9)
    assert toy.count == 9
    assert run("--quick", without=("quick",))[1].exit_code == 2
    with pytest.raises(TypeError, match="no such option: cuont"):
        run(cuont=9)


def test_values_by_name_in_place_of_the_spec():
    app, got = typer.Typer(), {}

    @app.command()
    @from_specs()
    def command(options: Annotated[dict[str, Any], Toy]):
        got.update(options)

    CliRunner().invoke(app, ["--stop", "2"])
    assert set(got) == {"rate", "count", "colors", "where", "folder", "draw", "quick", "stop", "secret"}
    assert got["stop"] == 2
    assert build(Toy, got).patience == 2


def test_every_option_explains_itself():
    for spec in (ExtractionSettings, Recipe):
        for entry in entries(spec):
            assert entry.option.help.endswith("."), entry.name
    assert {"alpha", "lr", "early_stop", "where", "epochs", "steps"} <= set(OPTIONS)
    assert "early_stop_patience" not in OPTIONS


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("lr", "fast", "lr must be a number, not 'fast'"),
        ("lr", True, "lr must be a number, not True"),
        ("batch_size", 1.5, "batch_size must be a whole number, not 1.5"),
        ("online", 1, "online must be true or false, not 1"),
        ("where", "split=train", "where must be a list of text, not 'split=train'"),
        ("slides", [8], r"slides must be a whole number, not \[8\]"),
        ("loss", ["mse"], r"loss must be text, not \['mse'\]"),
        ("student", 3.5, None),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_recipe(name, value, wanted):
    if wanted is None:
        assert check_option(name, value, Path("mine.toml")) == "3.5"
        return
    with pytest.raises(Exception, match=f"mine.toml: {wanted}"):
        check_option(name, value, Path("mine.toml"))


def test_values_of_the_right_kind_in_a_recipe():
    values = {"lr": 1, "where": ["a=b"], "hold_out": 0.1, "ema": 0, "steps": 5}
    found = {name: check_option(name, value, Path("mine.toml")) for name, value in values.items()}
    assert found == {"lr": 1.0, "where": ("a=b",), "hold_out": "0.1", "ema": 0.0, "steps": 5}
    settings = build(Recipe, found).settings
    assert isinstance(settings, DistillSettings)
    assert settings.train.optim.lr == 1.0


def test_the_reference_is_made_from_the_code():
    assert reference() == PAGE.read_text(encoding="utf-8"), "run python -m pipeline.cli.reference"
