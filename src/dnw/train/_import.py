"""A checkpoint of the authors' code as a run directory of ours."""

from __future__ import annotations

from pathlib import Path

from dnw.models import GraphChain, GraphClassifier, load_original, read_original
from dnw.recipes._config import Config
from dnw.train._checkpoint import Start
from dnw.train._network import make_model, make_network
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
    if config.edges == "random_original":
        changes |= {"rule": "random", "edges": None}
    config = config.model_copy(update=changes)
    content = read_original(file)
    heads = [w for n, w in content.weights.items() if n in ("fc.weight", "linear.weight", "linear.graph.weight")]
    if len(heads) != 1:
        raise ValueError(f"{file}: no classifier among its weights, so it is no network of the authors' code")
    num_classes = heads[0].shape[0]
    model = make_model(config, num_classes)
    if not isinstance(model, (GraphClassifier, GraphChain)):
        raise ValueError(f"model={config.model}: the authors' code has no checkpoints of it")
    try:
        edges = load_original(model, content.weights)
    except ValueError as error:
        raise ValueError(f"{file} does not fit recipe {config.recipe}: {error}") from None
    if edges and config.rule != "random":
        raise ValueError(f"{file}: it holds a fixed edge set, so choose the recipe of a random graph (rule={config.method})")
    if not edges and config.rule != "dnw":
        raise ValueError(
            f"{file}: it holds no fixed edge set, so choose the recipe of the learned wiring, not rule={config.method}"
        )
    network = make_network(config, num_classes, Start(model.state_dict(), edges or None, str(file)))
    if edges:
        try:  # the budget of the config must be that of the file
            make_network(config, num_classes).optimizer.load_state_dict(network.optimizer.state_dict())
        except ValueError as error:
            raise ValueError(f"{file} does not fit recipe {config.recipe}: {error}") from None
    epoch = content.epoch or 0
    if not 0 <= epoch <= config.epochs:
        raise ValueError(f"{file}: is of epoch {epoch}, but recipe {config.recipe} has {config.epochs}; give epochs={epoch}")
    run = RunDirectory.create(config, data_dir, num_classes, out)
    for checkpoint in (run.best, run.last):
        network.save(checkpoint, epoch, step=0)
    return run.path
