"""Whether the parts of a config fit together, which is asked before anything is written."""

from __future__ import annotations

import torch

from dnw.count import num_live_nodes
from dnw.data import FolderImages
from dnw.recipes._config import Config
from dnw.train._images import ImageData, make_batches, num_classes_of, num_steps
from dnw.train._network import make_model, make_network


def check_fit(config: Config, data: ImageData) -> None:
    """Raises ``ValueError`` where data, model, budget and rule of a config do not fit together, as its first seed shows."""
    channels = 3 if isinstance(data[0], FolderImages) else data[0].images.shape[1]
    if channels != len(config.data.mean):
        raise ValueError(f"data.mean={config.data.mean}: the images have {channels} channels")
    singles = [single for single in config.singles().values() if single.seed == config.seeds[0]]
    batches = make_batches(singles[0], data, torch.device("cpu"))
    images, _ = next(batches.test())
    try:
        with torch.no_grad():
            make_model(singles[0], num_classes_of(data)).eval()(images[:2])
    except RuntimeError as error:
        shape = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"model={config.model} does not take images of {shape} ({str(error).splitlines()[0]})") from None
    for single in singles:
        network = make_network(single, num_classes_of(data), steps=num_steps(single, batches))
        live, nodes = num_live_nodes(network.model, network.wiring)
        if network.wiring.rule.fixed and nodes and not live:
            raise ValueError(
                f"rule={single.rule}, seed {single.seed}: with its {network.wiring.num_active:,} edges nothing can reach an "
                "output of the graph, and they never change; raise the budget or take another seed"
            )
