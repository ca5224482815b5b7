"""Configs, overrides and their messages."""

import re

import pytest
from pydantic import BaseModel

from dnw.recipes import RECIPES, digits
from dnw.train import Config, changes, config_from_json, override


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_a_file(name):
    config = RECIPES[name]()
    assert config.recipe == name
    assert config_from_json(config.to_json(), "file") == config


def test_overrides():
    config = override(digits(), ["optim.lr=0.05", "seeds=0,1,2", "baseline=null", "data.flip=true", "rule=random", "epochs=3"])
    assert config.optim.lr == 0.05
    assert config.seeds == (0, 1, 2)
    assert config.baseline is None
    assert config.data.flip is True
    assert config.rule == "random"
    assert config.epochs == 3
    assert override(digits(), changes(config, digits())) == config
    assert changes(digits(), digits()) == []
    assert override(digits(), ["seeds=4"]).seeds == (4,)
    assert override(digits(), ["optim.lr=1e-3"]).optim.lr == 1e-3
    assert override(digits(), ["optim.milestones=0.5"]).optim.milestones == (0.5,)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("optim.lrr=1", r"optim.lrr: no such setting; did you mean 'optim.lr'\?"),
        ("optimm.lr=1", r"optimm.lr: no such setting; did you mean 'optim.lr'\?"),
        ("optim=1", "optim: no such setting"),
        ("epochs", "'epochs': an override is written key=value"),
        ("epochs=0", r"epochs: .*greater than or equal to 1 \(given: 0\)"),
        ("epochs=many", r"epochs: .*valid integer.*\(given: 'many'\)"),
        ("optim.lr=-1", r"optim.lr: .*greater than 0 \(given: -1\)"),
        ("optim.lr=nan", r"optim.lr: .*\(given: 'nan'\)|finite"),
        ("rule=dwn", r"rule: .*'dnw', 'no_update', .* or 'top_kast' \(given: 'dwn'\)"),
        ("seeds=0,0", "one or more different whole numbers"),
        ("seeds=-1", "one or more different whole numbers"),
        ("density=2", r"density: .*less than or equal to 1"),
        ("density=0.5", "given are num_edges=100, density=0.5; take one off, as in num_edges=null"),
        ("baseline=dnw", "baseline=dnw: is the rule of the run itself"),
        ("width=0.5", "width=0.5: model=tiny_digits has no width"),
        ("rule=random_original", "rule random_original is for model=tiny_cifar10 with rank_all_entries=true"),
        ("solver=rk5", "solver: .*'dopri5'"),
        ("optim.milestones=0.75,0.5", "increasing shares of the run"),
        ("recipe=../x", "recipe: "),
    ],
)
def test_bad_overrides(item, message):
    with pytest.raises(ValueError, match=message):
        override(digits(), [item])


def numeric_settings(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of all settings that hold a number, or several."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += numeric_settings(field.annotation, f"{prefix}{name}.")
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            found.append(prefix + name)
    return found


def test_all_numeric_settings_are_found():
    found = numeric_settings(Config)
    assert {"epochs", "seeds", "data.mean", "optim.milestones", "rule_settings.every", "density_schedule.power"} <= set(found)
    assert not {"recipe", "rule", "data.flip", "dense"} & set(found)


@pytest.mark.parametrize("key", numeric_settings(Config))
@pytest.mark.parametrize("value", ["1e30", "1e308", "-1e30", "9" * 4000, "9" * 5000])
def test_a_number_that_cannot_work_is_refused(key, value):
    with pytest.raises(ValueError, match=key.split(".")[-1]) as error:
        override(digits(), [f"{key}={value}"])
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("data.crop_padding=100000", "less than or equal to 4096"),
        ("data.crop_padding=9", "allowed is a whole number from 0 to image_size, here 8"),
        ("data.std=0", r"data.std.0: .*greater than or equal to 0.001"),
        ("first_epoch_snapshots=1000000000", r"less than or equal to 1000 \(given: 1000000000\)"),
        ("rule_settings.penalty=1e300", r"rule_settings.penalty: .*less than or equal to 1000"),
        ("optim.lr=1e308", r"optim.lr: .*less than or equal to 1000000"),
        ("pattern=" + "9" * 5000 + ":4", "pattern: "),
        ("epochs=" + "[" * 100_000, r"epochs: .*\[ \.\.\.\)"),
    ],
)
def test_where_the_bounds_are(item, message):
    with pytest.raises(ValueError, match=message):
        override(digits(), [item])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"epochs": ' + "9" * 5000 + "}"])
def test_a_config_that_no_reader_takes_is_named(text):
    with pytest.raises(ValueError, match=r"^c.json: not a config \(.*\)$"):
        config_from_json(text, "c.json")


def test_the_budget_of_a_chain():
    config = RECIPES["cifar10_mobilenet_dnw_x225"]()
    assert override(config, ["width=0.3"]).width == 0.3
    with pytest.raises(ValueError, match="a budget is one of 'width', 'num_edges', 'density'; none is given"):
        override(config, ["width=null"])
    with pytest.raises(ValueError, match="given are width=0.225, num_edges=5; take one off, as in width=null"):
        override(config, ["num_edges=5"])
    with pytest.raises(ValueError, match=r"width=1.5: the budget of a chain of graphs is that of a width from 0 to 1"):
        override(config, ["width=1.5"])


def test_bad_files():
    with pytest.raises(ValueError, match=r"c.json: not JSON \(line 1"):
        config_from_json("{", "c.json")
    text = digits().to_json().replace('"epochs"', '"epoch"')
    with pytest.raises(ValueError, match=r"c.json: .*epochs: Field required.*epoch: Extra inputs.*did you mean 'epochs'"):
        config_from_json(text, "c.json")
    with pytest.raises(ValueError, match=r"c.json: config: "):
        config_from_json("[]", "c.json")


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        digits().epochs = 3


def test_learning_rates():
    optim = override(digits(), ["optim.lr=1", "optim.schedule=steps", "optim.milestones=0.5,0.75"]).optim
    assert [optim.lr_at(e, 160) for e in (0, 79.9, 80, 119.9, 120)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = override(digits(), ["optim.lr=1"]).optim
    assert [cosine.lr_at(e, 10) for e in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert override(digits(), ["optim.schedule=constant"]).optim.lr_at(7, 10) == 0.1


def test_complete_needs_no_budget():
    values = digits().model_dump() | {"rule": "complete", "baseline": None, "num_edges": None}
    assert Config.model_validate(values).num_edges is None
