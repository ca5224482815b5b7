"""A checkpoint of the authors' code as a run directory of ours."""

from __future__ import annotations

from pathlib import Path

import torch

from dnw._rules.fixed import Frozen
from dnw._wiring.wire import wire
from dnw.models import GraphChain, GraphClassifier, load_original, read_original
from dnw.train._build import make_model, parameter_groups, wire_model
from dnw.train._checkpoint import write_checkpoint
from dnw.train._config import Config
from dnw.train._run import RunDirectory


def import_original(file: Path, config: Config, *, data_dir: Path, out: Path | None = None) -> Path:
    """Makes a run directory from a checkpoint of the authors' code, in either of its forms.

    What the authors' code does otherwise than the paper is switched on: all entries of a static graph compete, and a ReLU
    overwrites the states of the solver in continuous time.

    Args:
        file: ``epoch_N.pt``, ``best.pt`` or ``init.pt``.
        config: the recipe of the same network and budget; its rule is that of the checkpoint.
        data_dir: where the data lies that the run is to be tested on.
        out: the run directory; by default the first free ``runs/<recipe>-<number>``.

    Returns:
        The run directory, with the checkpoint as its best and its last one.

    Raises:
        ValueError: the file is no such checkpoint, or does not fit the network; the first mismatch is named.
    """
    changes: dict[str, object] = {"seeds": config.seeds[:1], "baseline": None, "rank_all_entries": True}
    if config.model == "tiny_cifar10_continuous":
        changes["rectify_in_place"] = True
    if config.rule == "random_original":
        changes["rule"] = "random"
    config = Config.model_validate({**config.model_dump(), **changes})
    content = read_original(file)
    heads = [w for n, w in content.weights.items() if n in ("fc.weight", "linear.weight", "linear.graph.weight")]
    if len(heads) != 1:
        raise ValueError(f"{file}: no classifier among its weights, so it is no network of the authors' code")
    model = make_model(config, heads[0].shape[0])
    if not isinstance(model, (GraphClassifier, GraphChain)):
        raise ValueError(f"model={config.model}: the authors' code has no checkpoints of it")
    try:
        edges = load_original(model, content.weights)
    except ValueError as error:
        raise ValueError(f"{file} does not fit recipe {config.recipe}: {error}") from None
    optimizer = torch.optim.SGD(parameter_groups(model, config.optim), lr=config.optim.lr, momentum=config.optim.momentum)
    if edges:
        if config.rule != "random":
            raise ValueError(f"{file}: it holds a fixed edge set, so choose the recipe of a random graph (rule={config.rule})")
        wire(model, optimizer, rule=Frozen(edges), include=list(edges))
        check = make_model(config, heads[0].shape[0])  # the budget of the config must be that of the file
        wire_model(config, check, other := torch.optim.SGD(parameter_groups(check, config.optim), lr=1.0))
        try:
            other.load_state_dict(optimizer.state_dict())
        except ValueError as error:
            raise ValueError(f"{file} does not fit recipe {config.recipe}: {error}") from None
    elif config.rule == "dnw":
        wire_model(config, model, optimizer)
    else:
        raise ValueError(
            f"{file}: it holds no fixed edge set, so choose the recipe of the learned wiring, not rule={config.rule}"
        )
    epoch = content.epoch or 0
    if not 0 <= epoch <= config.epochs:
        raise ValueError(f"{file}: is of epoch {epoch}, but recipe {config.recipe} has {config.epochs}; give epochs={epoch}")
    run = RunDirectory.create(config, data_dir, out)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": 0,
        "num_classes": heads[0].shape[0],
        "config": config.model_dump(mode="json"),
    }
    for path in (run.best, run.last):
        write_checkpoint(path, state)
    return run.path
