"""Configs, overrides and their messages."""

import dataclasses
import json
import re
from typing import get_args, get_type_hints

import pytest
import torch
from pydantic import BaseModel

import dnw
from dnw._rules import RULES
from dnw.data import DATASETS
from dnw.graphs._ode import ADAPTIVE, EQUAL_STEPS
from dnw.recipes import RECIPES, cifar10, digits
from dnw.recipes import _settings as settings
from dnw.recipes._config import changes
from dnw.train import Config, DataConfig, OptimConfig, config_from_json, override
from dnw.train._counts import config_of_model
from dnw.train._network import MODELS, make_model, make_network


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
        ("optim=1", "optim: is a part of the settings; give what is in it, 'optim.lr'"),
        ("epochs", "'epochs': an override is written key=value"),
        ("epochs=0", r"epochs: .*greater than or equal to 1 \(given: 0\)"),
        ("epochs=many", r"epochs: .*valid integer.*\(given: 'many'\)"),
        ("optim.lr=-1", r"optim.lr: .*greater than 0 \(given: -1\)"),
        ("optim.lr=nan", r"optim.lr: .*\(given: 'nan'\)|finite"),
        ("rule=dwn", r"rule: .*'dnw', 'no_update', .* or 'top_kast' \(given: 'dwn'\)"),
        ("seeds=0,0", "one or more different whole numbers"),
        ("seeds=-1", "one or more different whole numbers"),
        ("density=2", r"density: .*less than or equal to 1"),
        ("lr=0.1", r"lr: no such setting; did you mean 'optim.lr'\?"),
        ("baseline=dnw", "baseline=dnw: is the rule of the run itself"),
        ("width=0.5", "width=0.5: model=tiny_digits has no width"),
        ("floor.per_target=-1", "floor.per_target: .*greater than or equal to 0"),
        ("rule=random_original", "rule: random_original is no rule, .* write rule=frozen edges=random_original"),
        ("rule=ticket", "rule: ticket is no rule, .* write rule=frozen edges=ticket"),
        ("baseline=ticket", "baseline: ticket is no rule"),
        ("baseline=frozen", "baseline=frozen: edges that are given make a run of their own"),
        ("rule=frozen", "rule=frozen: give its edges, one of 'ticket', .*'barabasi_albert', as in edges=ticket"),
        ("edges=ticket", "edges=ticket: rule=dnw finds its own edges; rule=frozen takes given ones"),
        ("edges=none_of_ours", r"edges: .*'watts_strogatz' or 'barabasi_albert' \(given: 'none_of_ours'\)"),
        ("solver=rk5", "solver: .*'dopri5'"),
        ("optim.milestones=0.75,0.5", "increasing shares of the run"),
        ("recipe=../x", "recipe: "),
    ],
)
def test_bad_overrides(item, message):
    with pytest.raises(ValueError, match=message):
        override(digits(), [item])


def test_floors():
    graph = make_network(override(digits(), ["floor.per_target=1", "num_edges=200"]), 10).wiring["graph.weight"]
    assert int(graph.active.any(1).sum()) == int(graph.candidates.any(1).sum())
    with pytest.raises(ValueError, match="floor: the edges of rule=complete are given, so it has no floor"):
        override(digits(), ["floor.per_target=1", "rule=complete", "baseline=null"])
    with pytest.raises(ValueError, match="floor.per_target=1: pattern=channels has groups of its own"):
        override(digits(), ["floor.per_target=1", "pattern=channels"])


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


@pytest.mark.parametrize(
    ("rule", "item", "message"),
    [
        ("set", "dormant.gradient=pooled", "dormant.gradient=pooled: rule=set needs no gradient of dormant edges"),
        ("random", "dormant.momentum=hold", "dormant.momentum=hold: rule=random never changes its edges"),
        ("dnw", "dormant.gradient=half", "dormant.gradient: Input should be 'exact', 'bfloat16', 'pooled' or"),
    ],
)
def test_what_dormant_edges_get_fits_the_rule(rule, item, message):
    with pytest.raises(ValueError, match=message):
        override(digits(), [f"rule={rule}", "baseline=null", item])


def test_rules_that_need_no_gradient_of_dormant_edges():
    made = {name: rule(**{"targeted_dropout": {"rate": 0.5}}.get(name, {})) for name, rule in RULES.items()}
    needless = {name for name, rule in made.items() if not (rule.needs_dormant_gradient or rule.selects_by_gradient)}
    assert needless == set(settings.WITHOUT_DORMANT_GRADIENT)


def test_a_baseline_treats_dormant_edges_as_its_own_rule_does():
    config = override(digits(), ["rule=dnw", "baseline=set", "dormant.momentum=hold", "dormant.gradient=pooled"])
    singles = config.singles()
    assert singles["."].dormant.given() == {"gradient": "pooled", "momentum": "hold"}
    assert singles["./baseline"].dormant.given() == {}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"epochs": ' + "9" * 5000 + "}"])
def test_a_config_that_no_reader_takes_is_named(text):
    with pytest.raises(ValueError, match=r"^c.json: not a config \(.*\)$"):
        config_from_json(text, "c.json")


def test_the_budget_of_a_chain():
    config = RECIPES["cifar10_mobilenet_dnw_x225"]()
    assert override(config, ["width=0.3"]).width == 0.3
    with pytest.raises(ValueError, match="a budget is one of 'width', 'num_edges', 'density'; none is given"):
        override(config, ["width=null"])
    with pytest.raises(ValueError, match="given are width=0.3, num_edges=5; take one off, as in width=null"):
        override(config, ["num_edges=5", "width=0.3"])
    with pytest.raises(ValueError, match=r"width=1.5: the budget of a chain of graphs is that of a width from 0 to 1"):
        override(config, ["width=1.5"])


def test_a_budget_takes_the_place_of_the_recipes():
    found = override(digits(), ["density=0.1"])
    assert (found.density, found.num_edges) == (0.1, None)
    assert override(found, ["num_edges=50"]) == override(digits(), ["num_edges=50"])
    chain = override(RECIPES["cifar10_mobilenet_dnw_x225"](), ["num_edges=5"])
    assert (chain.width, chain.num_edges) == (None, 5)
    assert override(RECIPES["imagenet_expander_x50"](), ["width=0.25"]).density == 0.25
    with pytest.raises(ValueError, match="given are num_edges=100, density=0.1; take one off"):
        override(digits(), ["density=0.1", "num_edges=100"])
    with pytest.raises(ValueError, match="none is given"):
        override(digits(), ["num_edges=null"])


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


# --- a variant is one place ---


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("RuleName", dnw.RULES),
        ("ModelName", MODELS),
        ("SolverName", (*EQUAL_STEPS, *ADAPTIVE)),
        ("DataName", DATASETS),
    ],
)
def test_the_names_that_a_config_knows_are_those_that_there_are(name, table):
    known = get_args(getattr(settings, name))
    missing, unknown = [x for x in table if x not in known], [x for x in known if x not in table]
    assert not missing, f"add {missing} to {name} in dnw/recipes/_settings.py"
    assert not unknown, f"{name} in dnw/recipes/_settings.py has {unknown}, which there are no more"


@pytest.mark.parametrize("name", MODELS)
def test_a_network_by_its_name_is_a_config(name, libraries):
    libraries(name)
    config = config_of_model(name)
    assert (config.model, config.rule) == (name, "complete")
    images = torch.zeros(2, *config.data.input_size)
    assert make_model(config, 7).eval()(images).shape == (2, 7)
    assert config_of_model(name, (1, 20, 30)).data.input_size == (1, 20, 20)


def own_settings(rule: str) -> dict[str, object]:
    """The types of what can be set of a rule, by its class; the edges of rule frozen have a setting of their own."""
    kind = dnw.RULES[rule]
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "edges"}


@pytest.mark.parametrize("rule", dnw.RULES)
def test_the_settings_of_a_rule_are_those_of_its_class(rule):
    expected = own_settings(rule)
    listed = settings.RULE_SETTINGS.get(rule, ())
    where = "of dnw/recipes/_settings.py"
    assert set(listed) == set(expected), f"RULE_SETTINGS {where} has {listed} of {rule}, its class {tuple(expected)}"
    fixed = "belongs into" if dnw.RULES[rule].fixed else "does not belong into"
    assert dnw.RULES[rule].fixed == (rule in settings.FIXED_RULES), f"{rule} {fixed} FIXED_RULES {where}"
    for name, kind in expected.items():
        assert name in settings.RuleConfig.model_fields, f"add {name} ({kind}) to RuleConfig {where}"
        field = settings.RuleConfig.model_fields[name]
        assert field.default is None, f"{name} of RuleConfig {where} has a default of its own; leave it to the rule"
        found = set(get_args(field.annotation)) - {type(None)}
        wanted = set(get_args(kind)) - {type(None)} or {kind}
        if name in settings.SHARES_OF_THE_RUN:
            assert (found, wanted) == ({float}, {int}), f"{name} is given as a part of the run, and counts steps"
            continue
        assert found == wanted, f"{name} of RuleConfig {where} is {found}, that of {rule} is {wanted}"
        for bound in (getattr(entry, end, None) for entry in field.metadata for end in ("ge", "le")):
            if bound is not None:
                dnw.RULES[rule](**{name: bound})  # is allowed there as well


def test_every_setting_of_rules_belongs_to_one():
    used = {name for names in settings.RULE_SETTINGS.values() for name in names}
    assert set(settings.RuleConfig.model_fields) == used
    assert set(settings.RULE_SETTINGS) <= set(dnw.RULES)


# --- given edges, and configs of earlier versions ---


@pytest.mark.parametrize("edges", ["ticket", "random_original"])
def test_a_stored_config_that_names_given_edges_as_its_rule_is_translated(edges):
    recipe = {"ticket": "cifar10_mobilenet_lottery_x225", "random_original": "cifar10_random_original"}[edges]
    config = RECIPES[recipe]()
    assert (config.rule, config.edges, config.method) == ("frozen", edges, edges)
    values = json.loads(config.to_json())
    del values["edges"]
    assert config_from_json(json.dumps(values | {"rule": edges}), "config.json") == config
    with pytest.raises(ValueError, match=f"c.json: baseline: {edges} is no rule"):
        config_from_json(json.dumps(values | {"rule": "dnw", "baseline": edges}), "c.json")


def test_random_edges_as_the_authors_draw_them_are_for_their_network():
    with pytest.raises(ValueError, match="edges=random_original is for model=tiny_cifar10 with rank_all_entries=true and num"):
        override(cifar10(), ["rule=frozen", "edges=random_original"])
    assert override(cifar10(), ["rule=frozen", "edges=random_original", "rank_all_entries=true"]).method == "random_original"


# --- variants ---


def test_a_variant_is_checked_like_any_config():
    config = digits()
    assert config.model_copy(update={"num_edges": 50}) == override(config, ["num_edges=50"])
    assert config.model_copy() == config
    for change, message in [
        ({"num_edges": 0}, "num_edges: .*greater than or equal to 1"),
        ({"num_edge": 50}, "num_edge: .*did you mean 'num_edges'"),
        ({"density": 0.5}, "take one off"),
        ({"optim": {"lr": -1}}, "optim.lr: .*greater than 0"),
        ({"rule": "complete", "baseline": "complete"}, "is the rule of the run itself"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            config.model_copy(update=change)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="OptimConfig: lr: .*greater than 0"):
        OptimConfig().model_copy(update={"lr": 0})
    with pytest.raises(ValueError, match="DataConfig: .*give one of each per channel"):
        DataConfig(name="digits", image_size=8, mean=(0.1,), std=(1.0,)).model_copy(update={"std": (1.0, 1.0)})


def test_the_single_runs_of_a_config():
    config = override(digits(), ["seeds=3,4", "rule=rigl", "rule_settings.every=5", "density_schedule.end=0.5"])
    singles = config.singles()
    assert list(singles) == ["seed-3", "seed-3/baseline", "seed-4", "seed-4/baseline"]
    assert [(one.seed, one.rule, one.baseline) for one in singles.values()] == [
        (seed, rule, None) for seed in (3, 4) for rule in ("rigl", "random")
    ]
    assert singles["seed-3"].rule_settings.every == 5
    assert singles["seed-3/baseline"].rule_settings.every is None
    assert singles["seed-3/baseline"].density_schedule.end is None
    assert list(digits().singles()) == [".", "./baseline"]
    complete = override(digits(), ["pattern=channels", "num_edges=null", "density=0.5", "baseline=complete"]).singles()
    assert (complete["."].pattern, complete["./baseline"].pattern) == ("channels", None)
    with pytest.raises(ValueError, match="rule=l1_anneal prunes on a schedule"):
        override(digits(), ["baseline=l1_anneal"])
