"""The training loop, from top to bottom.

Contract: a run is a function of its config, and of what computes it: sums are taken in another order with another number
of threads, so that number is stored with the run, and a resumed run takes it again. Whatever is drawn in an epoch depends on
seed and epoch, a checkpoint is written after every epoch, and a resumed run ends in exactly the state of an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.count import num_live_nodes
from dnw.graphs import ContinuousTimeGraph
from dnw.recipes import config_of
from dnw.recipes._config import Config, override
from dnw.train._checkpoint import write_checkpoint
from dnw.train._evaluate import test
from dnw.train._fit import check_fit
from dnw.train._images import ImageData, load_data, make_batches, num_classes_of, num_steps
from dnw.train._lock import held
from dnw.train._log import Log
from dnw.train._loggers import Logger
from dnw.train._network import Network, load_network
from dnw.train._pictures import Pictures
from dnw.train._processes import (
    Alone,
    check_agreement,
    check_launcher,
    launch,
    lost_processes_named,
    part,
    sum_over_processes,
    threads_of,
)
from dnw.train._run import EpochMetrics, RunDirectory, TrainingStoppedError
from dnw.train._ticket import check_tickets, keep_ticket

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_STEPS_BETWEEN_CHECKS = 50


def train(
    recipe: str | Path | Config,
    *,
    data_dir: str | Path = "data",
    out: str | Path | None = None,
    log: Log | None = None,
    loggers: Sequence[Logger] = (),
    **settings: Any,
) -> Path:
    """Trains every seed of a recipe, each with its baseline where there is one.

    >>> run = train("digits", epochs=5, optim={"lr": 0.05})

    Args:
        recipe: its name, a config, or the path of a stored ``config.json``.
        data_dir: where the data lies.
        out: the run directory; by default the first free ``runs/<recipe>-<number>``.
        log: where progress is shown; ``Log(quiet=True)`` for nowhere.
        loggers: called after every epoch with the directory of the single run and the metrics of the epoch.
        settings: what is changed of the recipe, as :func:`override` takes them.

    Returns:
        The run directory.

    Raises:
        ValueError, OSError: no such recipe or setting, missing or damaged data, or a run directory that cannot be made.
        TrainingStoppedError: the loss is not finite; the last good checkpoint is kept.
        ChildProcessError: a process that trains or decodes along with this one has died; the run can be resumed.
    """
    config, data_dir, log, loggers = override(config_of(recipe), settings), Path(data_dir), log or Log(), list(loggers)
    check_launcher(config)
    data = load_data(config, data_dir)
    if config.processes == 1:
        log.data(config, data)
    check_fit(config, data)
    check_tickets(config, num_classes_of(data))
    fabric = launch(config, config.processes)
    with lost_processes_named(Path(out or "runs")):
        created = RunDirectory.create(config, data_dir, num_classes_of(data), out) if fabric.is_global_zero else None
        run = RunDirectory(fabric.broadcast("" if created is None else str(created.path)))
    _train_members(run, config, data, data_dir, fabric, log, loggers)
    part(fabric, run.path)
    return run.path


def resume(
    path: str | Path,
    *,
    epochs: int | None = None,
    data_dir: str | Path | None = None,
    log: Log | None = None,
    loggers: Sequence[Logger] = (),
) -> None:
    """Continues a run from its last checkpoints, to exactly the result of an unbroken run; or extends a finished one.

    Args:
        path: run directory.
        epochs: of a finished run: train on until it has so many. The learning rate goes on where a run of that length would
            be, and schedules of edges stay those of the first length. The config keeps, as ``extended_from``, how long the
            run was; a run that is given both from the start comes to the same.
        data_dir: where the data lies, if not where it lay.
        log, loggers: as for :func:`train`.

    Raises:
        ValueError: this is no run directory, another process trains it, or something in it is damaged; the file is named. Or
            it is extended to fewer epochs than it has, or before it is finished.
        TrainingStoppedError, ChildProcessError: as for :func:`train`.
    """
    run, log, loggers = RunDirectory(path), log or Log(), list(loggers)
    config = run.config()
    _check_resumable(run)
    if epochs is not None and epochs != config.epochs:
        config = config.extended(epochs)
        _check_extensible(run, epochs)
    check_launcher(config)
    data_dir = run.data_dir() if data_dir is None else Path(data_dir)
    data = load_data(config, data_dir)
    if config.processes == 1:
        log.data(config, data)
    check_fit(config, data)
    fabric = launch(config, config.processes)
    if fabric.is_global_zero and all(member.is_finished(single) for member, single in run.members(config)):
        log.line(f"finished already; dnw resume {run.path} epochs={2 * config.epochs} trains on")
    with threads_of(run, log if fabric.is_global_zero else None):
        _train_members(run, config, data, data_dir, fabric, log, loggers)
    part(fabric, run.path)


def _check_resumable(run: RunDirectory) -> None:
    """Raises ``ValueError`` where the checkpoint is gone that a run goes on from, or was never there."""
    for member, _ in run.members():
        if member.last.exists():
            continue
        if member.network.exists() or (member.path / "counts.json").exists():
            raise ValueError(f"{member.path}: is a result that was kept, without the checkpoint that training goes on from")
        if (done := len(member.metrics())) > 1:  # one that was killed as its first epoch ended has the metrics alone
            there = f"; put {member.best.name} in its place, or" if member.best.exists() else ":"
            raise ValueError(
                f"{member.path}: has {done} epochs and no {member.last.name} to go on from{there} train anew elsewhere"
            )


def _check_extensible(run: RunDirectory, epochs: int) -> None:
    """Raises ``ValueError`` where a run cannot be extended."""
    if (whole := run.whole()) is not None:
        raise ValueError(
            f"{run.path}: is a part of the run {whole.path}; dnw resume {whole.path} epochs={epochs} extends it all"
        )
    for member, config in run.members():
        if not member.is_finished(config):
            done = len(member.metrics())
            if not done and member.last.exists():
                raise ValueError(f"{member.path}: has a checkpoint and no metrics, as what was imported, so it is not extended")
            why = f"is at epoch {done} of {config.epochs}, and only a finished run is extended"
            raise ValueError(f"{member.path}: {why}; dnw resume {run.path} finishes it")


def _train_members(
    run: RunDirectory,
    config: Config,
    data: ImageData,
    data_dir: Path,
    fabric: Fabric | Alone,
    log: Log,
    loggers: Sequence[Logger],
) -> None:
    """Trains the single runs of a run, one after the other."""
    log.enabled &= fabric.is_global_zero
    if fabric.world_size > 1:
        log.data(config, data)
    members = list(run.members(config))
    try:
        with ExitStack() as stack:
            stack.enter_context(lost_processes_named(run.path))
            if fabric.is_global_zero:
                _prepare(run, config, members, data, data_dir, stack)
            fabric.barrier()
            for member, single in members:
                _train_one(member, single, data, fabric, log, loggers)
    except KeyboardInterrupt:
        log.line(f"stopped; continue with: dnw resume {run.path}")
        raise
    if fabric.is_global_zero:
        log.results([(single, member.metrics()) for member, single in members])
        log.end(run.path, members[0][0].page)


def _prepare(
    run: RunDirectory,
    config: Config,
    members: Sequence[tuple[RunDirectory, Config]],
    data: ImageData,
    data_dir: Path,
    stack: ExitStack,
) -> None:
    """Holds the directories of a run for this process, clears up after one that was killed, writes what is missing."""
    stack.enter_context(held(run.path))
    for member, single in members:
        if not member.exists:
            member.start(single, data_dir, num_classes_of(data))
        if member.path != run.path:
            stack.enter_context(held(member.path))
            member.extend(single)
        member.remove_parts()
        keep_ticket(member, single, num_classes_of(data))
    run.extend(config)  # last: it is what a resumed run believes
    run.remove_parts()


def _train_one(
    run: RunDirectory, config: Config, data: ImageData, fabric: Fabric | Alone, log: Log, loggers: Sequence[Logger]
) -> None:
    batches = make_batches(config, data, fabric.device, fabric.global_rank, fabric.world_size)
    network = load_network(
        run,
        config,
        "last" if run.last.exists() else None,
        num_classes=num_classes_of(data),
        steps=num_steps(config, batches),
        fabric=fabric,
    )
    model, optimizer, wiring, step = network.wrapped_model, network.wrapped_optimizer, network.wiring, network.step
    metrics = _metrics_until(network, run)
    pictures = Pictures(run, network, log) if fabric.is_global_zero else None
    if network.epoch == config.epochs:
        if pictures:
            pictures.refresh(last=True)
            for logger in loggers:  # which may be new to this run
                for epoch_metrics in metrics:
                    logger(run.path, epoch_metrics)
        return
    log.start(config, run.path, wiring.summary(), network.epoch)
    if pictures and step == 0:
        if config.rule == "complete":
            write_checkpoint(run.first, {"model": network.model.state_dict()})
        pictures.snapshot(0, 0.0, batches)
    early = {batches.num_batches * (i + 1) // (config.first_epoch_snapshots + 1) for i in range(config.first_epoch_snapshots)}

    for epoch in range(network.epoch, config.epochs):
        started = time.perf_counter()
        torch.manual_seed((config.seed * 1_000_003 + epoch + 1) % (1 << 63))
        edges_before = {name: wiring[name].active for name in wiring}
        sums = torch.zeros(3, device=fabric.device)  # of losses, of right answers, of images
        lr = config.optim.lr
        solves_before = _solves(network.model)
        model.train()
        with log.progress(batches.num_batches, epoch, config.epochs) as advance:
            for i, (images, labels) in enumerate(batches.train(epoch)):
                lr = config.lr_at(epoch + i / batches.num_batches)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with fabric.autocast():
                    logits = model(images)
                logits = logits.float()
                loss = F.cross_entropy(logits, labels, label_smoothing=config.optim.label_smoothing)
                optimizer.zero_grad()
                fabric.backward(loss)
                try:
                    optimizer.step()
                except FloatingPointError:  # whatever the loss is, nothing can be learned from such a gradient
                    raise _not_finite("a gradient", epoch, step + 1, lr, run) from None
                step += 1
                right = (logits.argmax(1) == labels).sum()
                sums += torch.stack([loss.detach().float() * len(labels), right.float(), right.new_tensor(len(labels)).float()])
                if i % _STEPS_BETWEEN_CHECKS == 0:
                    _check_finite(fabric, sums[0], epoch, step, lr, run)
                if pictures and epoch == 0 and i + 1 in early and i + 1 < batches.num_batches:
                    pictures.snapshot(step, (i + 1) / batches.num_batches)
                advance()
        next_loss = sums[0] if network.is_finite() else sums[0] * torch.nan  # weights that are not finite are not saved
        _check_finite(fabric, next_loss, epoch, step, lr, run)
        check_agreement(fabric, wiring, epoch)
        sums = sum_over_processes(fabric, sums)
        top1, top5, test_loss = test(network, batches, fabric)
        entered = sum(int((wiring[name].active & ~edges_before[name]).count_nonzero()) for name in wiring)
        live, nodes = num_live_nodes(network.model, wiring)
        epoch_metrics = EpochMetrics(
            epoch=epoch + 1,
            step=step,
            lr=lr,
            train_loss=float(sums[0] / sums[2]),
            train_top1=float(sums[1] / sums[2]),
            test_loss=test_loss,
            top1=top1,
            top5=top5,
            active=wiring.num_active,
            entered=entered,
            live=live,
            nodes=nodes,
            evaluations=_evaluations_per_pass(solves_before, _solves(network.model)),
            seconds=round(time.perf_counter() - started, 3),
        )
        is_best = all(top1 > m.top1 for m in metrics if m.active <= wiring.num_active)  # before a schedule's end none counts
        metrics.append(epoch_metrics)
        if pictures:
            pictures.snapshot(step, epoch + 1.0, batches if epoch + 1 in (1, config.epochs) else None)
            if is_best:
                network.save(run.best, epoch + 1, step, pictures.ages())
            run.write_metrics(metrics)
            for logger in loggers:
                logger(run.path, epoch_metrics)
            network.save(run.last, epoch + 1, step, pictures.ages())  # last: it is what a resumed run believes
            pictures.refresh(last=epoch + 1 == config.epochs)
        log.epoch(epoch_metrics, config.epochs)


def _metrics_until(network: Network, run: RunDirectory) -> list[EpochMetrics]:
    """The metrics of the epochs that a network has been trained for."""
    if network.epoch and not network.step:
        raise ValueError(
            f"{run.last}: was imported at epoch {network.epoch}, without what training goes on with; it can be evaluated, "
            "counted and compiled"
        )
    metrics = [m for m in run.metrics() if m.epoch <= network.epoch] if network.epoch else []
    if network.step and (len(metrics) != network.epoch or metrics[-1].step != network.step):
        file, epochs = run.path / "metrics.jsonl", network.epoch
        raise ValueError(f"{file}: does not hold the {epochs} epochs of {run.last.name}; put it back from a copy")
    return metrics


def _solves(model: nn.Module) -> tuple[int, int]:
    """How often the equations of a model's graphs in continuous time were solved and evaluated so far."""
    graphs = [m for m in model.modules() if isinstance(m, ContinuousTimeGraph)]
    return sum(g.num_solves for g in graphs), sum(g.num_evaluations for g in graphs)


def _evaluations_per_pass(before: tuple[int, int], after: tuple[int, int]) -> float:
    solves = after[0] - before[0]
    return round((after[1] - before[1]) / solves, 2) if solves else 0.0


def _check_finite(fabric: Fabric | Alone, loss: Tensor, epoch: int, step: int, lr: float, run: RunDirectory) -> None:
    if not bool(torch.isfinite(sum_over_processes(fabric, loss.clone()))):
        raise _not_finite("the loss", epoch, step, lr, run)


def _not_finite(what: str, epoch: int, step: int, lr: float, run: RunDirectory) -> TrainingStoppedError:
    kept = f"the last good checkpoint is {run.last} (epoch {epoch})" if run.last.exists() else "no epoch was finished"
    return TrainingStoppedError(
        f"{what} is not finite in epoch {epoch + 1} (step {step}, learning rate {lr:g}); {kept}; lower optim.lr and start anew"
    )
