"""Two lines under FSDP2: torchrun --nproc-per-node 2 examples/fsdp2_digits.py

In the order that torchtitan keeps: model on the meta device, ``fully_shard``, storage, initial weights, optimizer, and then
the wiring. Each process selects in its own shards; no weight is gathered. Checkpoints go through
``torch.distributed.checkpoint`` and can be continued on another number of processes.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dnw
from dnw.data import read_digits

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--resume", action="store_true", help="continue the checkpoint")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world,))

    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 129), nn.ReLU(), nn.Linear(129, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    wiring = dnw.wire(model, optimizer, density=0.1)

    epochs_done = 0
    if arguments.resume:
        weights, state = get_state_dict(model, optimizer, options=OPTIONS)
        content = {"model": weights, "optimizer": state, "epochs": torch.zeros(1)}
        dcp.load(content, checkpoint_id=arguments.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=OPTIONS)
        epochs_done = int(content["epochs"])

    train, test = ((x.images.to(device) / 255, x.labels.to(device)) for x in read_digits())
    for epoch in range(epochs_done, arguments.epochs):
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64 * world)[:-1]:
            mine = batch[rank::world]
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][mine]), train[1][mine]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()

    weights, state = get_state_dict(model, optimizer, options=OPTIONS)
    content = {"model": weights, "optimizer": state, "epochs": torch.tensor([arguments.epochs])}
    dcp.save(content, checkpoint_id=arguments.checkpoint)
    if rank == 0:
        print(wiring.summary())
        print(f"steps {wiring.step}  accuracy {accuracy:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
