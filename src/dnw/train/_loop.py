"""The training loop, from top to bottom.

Contract: a run is a function of its config, and of what computes it: sums are taken in another order with another number
of threads, so that number is stored with the run, and a resumed run takes it again. Whatever is drawn in an epoch depends on
seed and epoch, a checkpoint is written after every epoch, and a resumed run ends in exactly the state of an unbroken one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from dnw._wiring.wiring import Wiring
from dnw.count import num_live_nodes
from dnw.data import Batches
from dnw.graphs import ContinuousTimeGraph
from dnw.train._build import ImageData, check_fit, load_data, make_batches, num_steps
from dnw.train._checkpoint import read_checkpoint, write_checkpoint
from dnw.train._config import Config
from dnw.train._lock import held
from dnw.train._log import Log
from dnw.train._pictures import Pictures
from dnw.train._run import EpochMetrics, RunDirectory, TrainingStoppedError
from dnw.train._state import State
from dnw.train._ticket import draw_ticket, keep_ticket

_STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True)
class Scores:
    """Top-1 and top-5 accuracy of one checkpoint of one run on the test images, as shares."""

    run: Path
    rule: str
    seed: int
    checkpoint: str
    epoch: int
    top1: float
    top5: float


def train(config: Config, *, data_dir: Path, out: Path | None = None, log: Log | None = None) -> Path:
    """Trains every seed of a config, each with its baseline where there is one.

    Args:
        config: what to run.
        data_dir: where the data lies.
        out: the run directory; by default the first free ``runs/<recipe>-<number>``.
        log: where progress is shown.

    Returns:
        The run directory.

    Raises:
        ValueError, OSError: missing or damaged data, or a run directory that cannot be made.
        TrainingStoppedError: the loss is not finite; the last good checkpoint is kept.
        ChildProcessError: a process that trains or decodes along with this one has died; the run can be resumed.
    """
    _check_launcher(config)
    data = load_data(config, data_dir)
    check_fit(config, data)
    for seed in config.seeds if config.rule == "ticket" else ():  # before anything is written
        draw_ticket(config.model_copy(update={"seeds": (seed,)}), len(data[0].classes))
    fabric = _launch(config)
    with _lost_processes_named(out or Path("runs")):
        path = str(RunDirectory.create(config, data_dir, out).path) if fabric.is_global_zero else ""
        run = RunDirectory(fabric.broadcast(path))
    _run_members(run, fabric, data, data_dir, log or Log())
    _part(fabric, run.path)
    return run.path


def resume(path: Path, *, data_dir: Path | None = None, log: Log | None = None) -> None:
    """Continues a run from its last checkpoints, to exactly the result of an unbroken run.

    Raises:
        ValueError: this is no run directory, another process trains it, or something in it is damaged; the file is named.
        TrainingStoppedError, ChildProcessError: as for :func:`train`.
    """
    run = RunDirectory(path)
    config = run.config()
    _check_launcher(config)
    data_dir = run.data_dir() if data_dir is None else data_dir
    data = load_data(config, data_dir)
    check_fit(config, data)
    fabric = _launch(config)
    log = log or Log()
    with _threads(run, log if fabric.is_global_zero else None):
        _run_members(run, fabric, data, data_dir, log)
    _part(fabric, run.path)


def evaluate(path: Path, *, data_dir: Path | None = None) -> list[Scores]:
    """Tests the best and the last checkpoint of every single run in a run directory.

    Raises:
        ValueError: this is no run directory, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    config = run.config()
    data = load_data(config, run.data_dir() if data_dir is None else data_dir)
    fabric = _launch(config.model_copy(update={"processes": 1}))
    scores = []
    with _threads(run), _lost_processes_named(path):
        for member, one in run.members():
            for file in (member.best, member.last):
                if not file.exists():
                    raise ValueError(f"{member.path}: no {file.name} yet; dnw resume {path} trains on")
                content = read_checkpoint(file, one)
                batches = make_batches(one, data, fabric.device, 0, 1)
                state = State(one, len(data[0].classes), num_steps(one, batches), member, fabric)
                state.load(file, content)
                top1, top5, _ = _test(fabric, state, batches)
                scores.append(Scores(member.path, one.rule, one.seeds[0], file.stem, content["epoch"], top1, top5))
    return scores


def _check_launcher(config: Config) -> None:
    """Raises ``ValueError`` where torchrun has started another number of processes: each would train a run of its own."""
    started = os.environ.get("WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    if started and started != str(config.processes):
        raise ValueError(
            f"torchrun has started {started} processes, but processes={config.processes}; give processes={started} as well"
        )


def _launch(config: Config) -> Fabric:
    if config.device == "cuda" and torch.cuda.device_count() < config.processes:
        raise ValueError(
            f"device=cuda, processes={config.processes}: this machine shows {torch.cuda.device_count()} CUDA devices; use "
            "device=cpu or fewer processes"
        )
    fabric = Fabric(
        accelerator=config.device,
        devices=config.processes,
        strategy="ddp" if config.processes > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


@contextmanager
def _threads(run: RunDirectory, log: Log | None = None) -> Iterator[None]:
    """Computes with as many threads as the run was started with, where it says so."""
    before = torch.get_num_threads()
    wanted = run.environment().get("threads") or before
    if log is not None and wanted != before:
        log.line(f"{wanted} threads, as this run was started with")
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _lost_processes_named(path: Path) -> Iterator[None]:
    """Says in one line what PyTorch says in many when a process has died that works along with this one."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            who = "a process that decodes images (data.workers)"
        elif isinstance(error, torch.distributed.DistError) or "gloo" in text or "Connection closed by peer" in text:
            who = "another process of this run"
        else:
            raise
        raise ChildProcessError(
            f"{who} has died; nothing of a finished epoch is lost: continue with dnw resume {path}"
        ) from None


def _part(fabric: Fabric, path: Path) -> None:
    """Ends the group of processes together: one that goes first makes the others abort on their way out."""
    with _lost_processes_named(path):
        fabric.barrier()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _run_members(run: RunDirectory, fabric: Fabric, data: ImageData, data_dir: Path, log: Log) -> None:
    log.enabled = fabric.is_global_zero
    members = list(run.members())
    try:
        with ExitStack() as stack:
            stack.enter_context(_lost_processes_named(run.path))
            if fabric.is_global_zero:
                _prepare(run, members, data, data_dir, stack)
            fabric.barrier()
            for member, config in members:
                batches = make_batches(config, data, fabric.device, fabric.global_rank, fabric.world_size)
                _train_one(config, fabric, member, batches, data, log)
    except KeyboardInterrupt:
        log.line(f"stopped; continue with: dnw resume {run.path}")
        raise
    if fabric.is_global_zero:
        log.results([(config.rule, config.seeds[0], member.metrics()) for member, config in members])
    log.line(f"run: {run.path}   (dnw eval {run.path} tests its best and last checkpoint again)")


def _prepare(
    run: RunDirectory, members: list[tuple[RunDirectory, Config]], data: ImageData, data_dir: Path, stack: ExitStack
) -> None:
    """Holds the directories of a run for this process, clears up after one that was killed, writes what is missing."""
    stack.enter_context(held(run.path))
    for member, config in members:
        if not (member.path / "config.json").exists():
            member.start(config, data_dir)
        if member.path != run.path:
            stack.enter_context(held(member.path))
        member.remove_parts()
        keep_ticket(member.path, config, len(data[0].classes))
    run.remove_parts()


def _train_one(config: Config, fabric: Fabric, run: RunDirectory, batches: Batches, data: ImageData, log: Log) -> None:
    state = State(config, len(data[0].classes), num_steps(config, batches), run, fabric)
    model, optimizer, wiring = state.wrapped_model, state.wrapped_optimizer, state.wiring
    (seed,) = config.seeds
    done, step, metrics = _continue(config, run, state, batches)
    pictures = Pictures(run, config, state, step, log) if fabric.is_global_zero else None
    if done == config.epochs:
        if pictures:
            pictures.refresh(last=True)
        return
    log.start(config, run.path, wiring.summary(), done)
    if pictures and step == 0:
        if config.rule == "complete":
            write_checkpoint(run.first, {"model": state.model.state_dict()})
        pictures.snapshot(0, 0.0, batches)
    early = {batches.num_batches * (i + 1) // (config.first_epoch_snapshots + 1) for i in range(config.first_epoch_snapshots)}

    for epoch in range(done, config.epochs):
        started = time.perf_counter()
        torch.manual_seed((seed * 1_000_003 + epoch + 1) % (1 << 63))
        edges_before = {name: wiring[name].active for name in wiring}
        sums = torch.zeros(3, device=fabric.device)  # of losses, of right answers, of images
        lr = config.optim.lr
        solves_before = _solves(state.model)
        model.train()
        with log.progress(batches.num_batches, epoch, config.epochs) as advance:
            for i, (images, labels) in enumerate(batches.train(epoch)):
                lr = config.optim.lr_at(epoch + i / batches.num_batches, config.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                logits = model(images)
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
        next_loss = sums[0] if state.is_finite() else sums[0] * torch.nan  # weights that are not finite are not saved
        _check_finite(fabric, next_loss, epoch, step, lr, run)
        _check_agreement(fabric, wiring, epoch)
        sums = _sum_over_processes(fabric, sums)
        top1, top5, test_loss = _test(fabric, state, batches)
        entered = sum(int((wiring[name].active & ~edges_before[name]).count_nonzero()) for name in wiring)
        live, nodes = num_live_nodes(state.model, wiring)
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
            evaluations=_evaluations_per_pass(solves_before, _solves(state.model)),
            seconds=round(time.perf_counter() - started, 3),
        )
        is_best = all(top1 > m.top1 for m in metrics if m.active <= wiring.num_active)  # before a schedule's end none counts
        metrics.append(epoch_metrics)
        if pictures:
            pictures.snapshot(step, epoch + 1.0, batches if epoch + 1 in (1, config.epochs) else None)
            if is_best:
                state.save(run.best, epoch + 1, step)
            run.write_metrics(metrics)
            state.save(run.last, epoch + 1, step)  # last: it is what a resumed run believes
            pictures.refresh(last=epoch + 1 == config.epochs)
        log.epoch(epoch_metrics, config.epochs)


def _continue(config: Config, run: RunDirectory, state: State, batches: Batches) -> tuple[int, int, list[EpochMetrics]]:
    """Takes over a run's last checkpoint, where it has one; returns the epochs and steps done, and their metrics."""
    if not run.last.exists():
        return 0, 0, []
    content = read_checkpoint(run.last, config)
    done, step = content["epoch"], content["step"]
    if step and step != done * batches.num_batches:
        raise ValueError(
            f"{run.last}: it was trained on {step // done:,} batches an epoch, and the data now gives {batches.num_batches:,}; "
            "continue with the same images and number of processes"
        )
    state.load(run.last, content)
    metrics = [m for m in run.metrics() if m.epoch <= done]
    if step and (len(metrics) != done or metrics[-1].step != step):
        raise ValueError(
            f"{run.path / 'metrics.jsonl'}: does not hold the {done} epochs of {run.last.name}; put it back from a copy"
        )
    return done, step, metrics


def _solves(model: nn.Module) -> tuple[int, int]:
    """How often the equations of a model's graphs in continuous time were solved and evaluated so far."""
    graphs = [m for m in model.modules() if isinstance(m, ContinuousTimeGraph)]
    return sum(g.num_solves for g in graphs), sum(g.num_evaluations for g in graphs)


def _evaluations_per_pass(before: tuple[int, int], after: tuple[int, int]) -> float:
    solves = after[0] - before[0]
    return round((after[1] - before[1]) / solves, 2) if solves else 0.0


@torch.no_grad()
def _test(fabric: Fabric, state: State, batches: Batches) -> tuple[float, float, float]:
    """Top-1, top-5 and mean loss on the test images, with the weights that the rule evaluates with."""
    sums = torch.zeros(4, device=fabric.device)
    model: nn.Module = state.wrapped_model
    model.eval()
    with state.wiring.settled():
        for images, labels in batches.test():
            sums += _batch_scores(model(images), labels)
    right1, right5, loss, images_seen = _sum_over_processes(fabric, sums).tolist()
    return right1 / images_seen, right5 / images_seen, loss / images_seen


def _batch_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Right at first, right among five, sum of losses, number of images."""
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([ranked[:, 0].sum().float(), ranked.sum().float(), loss, loss.new_tensor(len(labels))])


def _sum_over_processes(fabric: Fabric, values: Tensor) -> Tensor:
    reduced = fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced


def _check_agreement(fabric: Fabric, wiring: Wiring, epoch: int) -> None:
    """Raises where processes that train together have come to hold different latent weights or edges."""
    if fabric.world_size == 1:
        return
    digest = [f(wiring[n]).double().sum() for n in wiring for f in (lambda p: p.latent, lambda p: p.latent * p.active)]
    everywhere = fabric.all_gather(torch.stack(digest))
    assert isinstance(everywhere, Tensor)
    if not bool((everywhere == everywhere[0]).all()):
        raise TrainingStoppedError(f"after epoch {epoch + 1} the processes hold different wirings; nothing of it was saved")


def _check_finite(fabric: Fabric, loss: Tensor, epoch: int, step: int, lr: float, run: RunDirectory) -> None:
    if not bool(torch.isfinite(_sum_over_processes(fabric, loss.clone()))):
        raise _not_finite("the loss", epoch, step, lr, run)


def _not_finite(what: str, epoch: int, step: int, lr: float, run: RunDirectory) -> TrainingStoppedError:
    kept = f"the last good checkpoint is {run.last} (epoch {epoch})" if run.last.exists() else "no epoch was finished"
    return TrainingStoppedError(
        f"{what} is not finite in epoch {epoch + 1} (step {step}, learning rate {lr:g}); {kept}; lower optim.lr and start anew"
    )
