"""The network of a run with its optimizer and its wiring: made by a config, filled from a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dnw._wiring.state import STATE_KEYS
from dnw.train._build import make_model, parameter_groups, wire_model
from dnw.train._checkpoint import write_checkpoint
from dnw.train._config import Config
from dnw.train._run import RunDirectory
from dnw.train._ticket import edges_of_ticket

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class State:
    """A model with its optimizer and its wiring, as a run trains them.

    Args:
        config: of the single run.
        num_classes: of the data.
        steps: of the whole run; None where none are taken any more and no schedule can say how many there are.
        run: the directory that keeps the run's ticket, where it has one.
        fabric: what wraps model and optimizer for training, before they are wired.
    """

    def __init__(
        self, config: Config, num_classes: int, steps: int | None, run: RunDirectory, fabric: Fabric | None = None
    ) -> None:
        self._config, self._num_classes = config, num_classes
        self.model = make_model(config, num_classes)
        edges = edges_of_ticket(run.path, self.model)
        optim = config.optim
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, optim), lr=optim.lr, momentum=optim.momentum)
        self.wrapped_model: nn.Module = self.model
        self.wrapped_optimizer: torch.optim.Optimizer = self.optimizer
        if fabric is not None:
            self.wrapped_model, self.wrapped_optimizer = fabric.setup(self.model, self.optimizer)
        self.wiring = wire_model(config, self.wrapped_model, self.wrapped_optimizer, steps, edges)

    def save(self, path: Path, epoch: int, step: int) -> None:
        """Writes the checkpoint of an epoch."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "step": step,
            "num_classes": self._num_classes,
            "config": self._config.model_dump(mode="json"),
        }
        write_checkpoint(path, content)

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """Takes over a checkpoint as :func:`read_checkpoint` gives it.

        Raises:
            ValueError: it does not fit; the file is named.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            classes = content.get("num_classes", self._num_classes)
            if classes != self._num_classes:
                raise ValueError(f"it tells {classes} classes apart, and there are {self._num_classes}")
            self._check_kinds(content["model"])
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "the loaded optimizer state")  # says that latent weights are missing
                self.model.load_state_dict(content["model"])  # first: the optimizer's latent weights then count
                self.optimizer.load_state_dict(content["optimizer"])
            for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(own)  # what the config says counts, whatever stands in the file
            self._check_optimizer()
        except Exception as error:  # whatever a file that is none of ours makes PyTorch stumble over
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: does not fit the run's config ({reason})") from None

    def is_finite(self) -> bool:
        """Whether all weights are, the latent ones too."""
        weights = [*self.model.state_dict().values(), *(parameter.latent for parameter in self.wiring.values())]
        return bool(torch.stack([torch.isfinite(weight).all() for weight in weights]).all())

    def _check_kinds(self, weights: dict[str, Tensor]) -> None:
        for name, own in self.model.state_dict().items():
            if name in weights and weights[name].dtype != own.dtype:
                raise ValueError(f"{name} is {weights[name].dtype}, not {own.dtype}")

    def _check_optimizer(self) -> None:
        for parameter, entry in self.optimizer.state.items():
            for key, value in entry.items():
                if key in STATE_KEYS or value is None:
                    continue
                if not isinstance(value, Tensor) or value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
                    raise ValueError(f"the optimizer's {key} is no tensor of finite numbers of the parameter's shape")
