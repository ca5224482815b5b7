"""Rules against each other at equal edges: python benchmarks/arena.py NETWORK [screen | final] --data-dir DATA

Every contender trains the same network with as many edges, epochs and images, from the same weights for a seed. The screen is
short and measured on training images that are held out, so settings may be tuned on it; the finals are measured on the test
images; --epochs gives some more or fewer, for comparisons at equal seconds. Runs lie in runs/arena; called again it goes on
where it stopped, and it ends with the table of what is finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dnw.recipes import RECIPES
from dnw.train import Config, RunDirectory, override, results_table, resume, train

NETWORKS = {
    "tiny": ("cifar10", ["batch_size=128", "optim.schedule=cosine"]),
    "chain": ("cifar10_mobilenet_dnw_x225", []),
    "resnet18-10": ("cifar10_resnet18_dnw", ["width=0.25", "density=0.1"]),
    "resnet18-5": ("cifar10_resnet18_dnw", ["width=0.25", "density=0.05"]),
}
EPOCHS = {"screen": 5, "final": 20}
HELD_OUT = {"chain": 30_000}
"""Training images that the screen is measured on, where not 5,000: so short is the chain's."""
FALLING = ["density_schedule.end=0.5", "density_schedule.every=10"]
EXCHANGES = ["rule_settings.every=50", "rule_settings.until=0.75"]
CONTENDERS = {
    "dnw": [],
    "norm-ste": ["rule=norm_ste", "floor.per_target=1"],
    "norm-ste-falling": ["rule=norm_ste", "floor.per_target=1", *FALLING],
    "norm-ste-rate-0.3-falling": ["rule=norm_ste", "rule_settings.rate=0.3", "floor.per_target=1", *FALLING],
    "norm-ste-rate-1-falling": ["rule=norm_ste", "rule_settings.rate=1.0", "floor.per_target=1", *FALLING],
    "norm-ste-rate-1-falling-no-floor": ["rule=norm_ste", "rule_settings.rate=1.0", *FALLING],
    "dnw-floor": ["floor.per_target=1"],
    "dnw-falling": FALLING,
    "iht-falling": ["rule=iht", "floor.per_target=1", *FALLING],
    "random": ["rule=random"],
    "watts-strogatz": ["rule=frozen", "edges=watts_strogatz"],
    "barabasi-albert": ["rule=frozen", "edges=barabasi_albert"],
    "no-update": ["rule=no_update"],
    "targeted-dropout": ["rule=targeted_dropout"],
    "magnitude-pruning": ["rule=magnitude_pruning", *FALLING],
    "l1-anneal": ["rule=l1_anneal", "rule_settings.penalty=1e-4", *FALLING],
    "set": ["rule=set", *EXCHANGES],
    "rigl": ["rule=rigl", *EXCHANGES],
    "sparse-momentum": ["rule=sparse_momentum", *EXCHANGES],
    "sr-ste": ["rule=sr_ste"],
    "st3": ["rule=st3", *FALLING],
    "feather": ["rule=feather", *FALLING],
    "top-kast": ["rule=top_kast", "rule_settings.backward=3.0"],
}


def contest(network: str, stage: str, contender: str, seed: int, epochs: int) -> Config:
    """The config of one run."""
    recipe, changes = NETWORKS[network]
    held_out = [f"data.validation={HELD_OUT.get(network, 5_000)}"] if stage == "screen" else []
    return override(RECIPES[recipe](), [*changes, *held_out, f"epochs={epochs}", f"seeds={seed}", *CONTENDERS[contender]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("stage", choices=EPOCHS)
    parser.add_argument("--rules", help="contenders, separated by commas (default: all that the network can have)")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--epochs", type=int, help="of every run (default: 5 in the screen, 20 in the finals)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/arena"))
    given = parser.parse_args()
    graphs = NETWORKS[given.network][0] != "cifar10_resnet18_dnw"
    able = [name for name, changes in CONTENDERS.items() if graphs or not any(c.startswith("edges=") for c in changes)]
    rules = given.rules.split(",") if given.rules else able
    if unknown := set(rules) - set(able):
        parser.error(f"--rules: no {', '.join(sorted(unknown))}; there are {', '.join(able)}")
    epochs = given.epochs or EPOCHS[given.stage]
    stage = given.stage if epochs == EPOCHS[given.stage] else f"{given.stage}{epochs}"
    runs = []
    for seed in map(int, given.seeds.split(",")):
        for contender in rules:
            run = given.out / f"{given.network}-{stage}-{contender}-{seed}"
            config = contest(given.network, given.stage, contender, seed, epochs)
            if not RunDirectory(run).exists:
                train(config, data_dir=given.data_dir, out=run)
            elif not RunDirectory(run).is_finished(config):
                resume(run, data_dir=given.data_dir)
            runs.append(run)
    print(results_table(runs))


if __name__ == "__main__":
    main()
