"""Two lines before a Hugging Face Trainer: python examples/transformers_digits.py

The Trainer takes an optimizer that is made already; its own checkpoints and ``resume_from_checkpoint`` need nothing more.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import EvalPrediction

import dnw
from dnw.data import read_digits


class Digits(Dataset[dict[str, Tensor]]):
    """The rows of an image as a sequence of 8 vectors."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.rows, self.labels = images.flatten(0, -3).float() / 255, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"rows": self.rows[i], "labels": self.labels[i]}


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.zeros(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(self.embed(rows) + self.position).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, 1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--root", default="runs/transformers", help="where checkpoints go")
    parser.add_argument("--resume", action="store_true", help="continue the last checkpoint")
    arguments = parser.parse_args()
    set_seed(0)
    train, test = (Digits(x.images, x.labels) for x in read_digits())
    model = Transformer()

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    wiring = dnw.wire(model, optimizer, density=0.2)

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=arguments.root,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=512,
            lr_scheduler_type="cosine",
            save_strategy="epoch",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    print(wiring.summary())
    print(f"steps {wiring.step}  accuracy {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
