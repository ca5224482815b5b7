"""Two lines in a LightningModule: python examples/lightning_digits.py

Both stand in ``configure_optimizers``, which Lightning calls when the model is on its device and, with several processes,
has the same weights on all of them. Checkpoints, ``ckpt_path=...`` and mixed precision need nothing more.
"""

import argparse
import logging

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dnw
from dnw.data import read_digits


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        self.wiring = dnw.wire(self, optimizer, density=0.1)
        return optimizer

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), sync_dist=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--root", default="runs/lightning", help="where checkpoints go")
    parser.add_argument("--resume", help="a checkpoint to continue")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0)
    train, test = (TensorDataset(x.images / 255, x.labels) for x in read_digits())
    model = Digits()
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        devices=arguments.devices,
        default_root_dir=arguments.root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        DataLoader(train, batch_size=64, shuffle=True, num_workers=0),
        DataLoader(test, batch_size=512),
        ckpt_path=arguments.resume,
    )
    if trainer.is_global_zero:
        print(model.wiring.summary())
        print(f"steps {model.wiring.step}  accuracy {trainer.callback_metrics['accuracy']:.4f}")
        print(f"checkpoint {trainer.checkpoint_callback.best_model_path}")


if __name__ == "__main__":
    main()
