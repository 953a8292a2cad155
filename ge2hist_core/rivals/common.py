"""What the rivals share: the training loop with its budget and checkpoints, drawing in fixed chunks, saving.

Same picture in any batch, as in :mod:`ge2hist_core.model`: all noise of a picture comes from its own seed, and networks
always see ``CHUNK`` pictures, the last chunk padded with copies.

All random numbers are drawn on the CPU, before a step and apart from it, so that threads can prepare the next steps and
so that a GPU sees the numbers that the CPU sees. Pictures are always drawn on the CPU.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ge2hist_core import rng
from ge2hist_core.autoencoder import from_uint8, to_uint8
from ge2hist_core.config import from_json, to_json
from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.loader import ahead
from ge2hist_core.types import BadInput, Cells

if TYPE_CHECKING:
    import scipy.sparse as sp

    from ge2hist_core.store import TissueStore

__all__ = [
    "CHUNK",
    "DEVICES",
    "Budget",
    "Progress",
    "Rival",
    "TrainingTiles",
    "count_macs",
    "descend",
    "device_called",
    "gradient_penalty",
    "pixels_of",
    "read_header",
    "wasserstein_step",
]

SCHEMA = 1
CHUNK = 4
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Budget:
    """How long to train, over all runs of one folder: until the first limit that is reached.

    Parameters
    ----------
    macs: multiply-accumulates of the training steps. cpu_seconds: their CPU time, summed over cores.
    steps: number of training steps. seconds: their time by the clock.
    """

    macs: float | None = None
    cpu_seconds: float | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("macs", "cpu_seconds", "steps", "seconds")}
        if all(value is None for value in limits.values()):
            raise BadInput("The budget has no limit: give multiply-accumulates, CPU seconds, seconds or steps.")
        for name, value in limits.items():
            if value is not None and not value > 0:
                raise BadInput(f"The budget's {name} is {value!r}: give a number above 0.")

    def spent(self, macs: float, cpu_seconds: float, steps: int, seconds: float) -> float:
        """Share of the budget that is used, 1 when it is spent."""
        pairs = ((macs, self.macs), (cpu_seconds, self.cpu_seconds), (steps, self.steps), (seconds, self.seconds))
        return max(used / limit for used, limit in pairs if limit is not None)


@dataclass(frozen=True)
class Progress:
    """Training step ``step`` (from 1) is done; ``spent`` is the share of the budget, ``terms`` are losses by name."""

    step: int
    spent: float
    macs: int
    cpu_seconds: float
    terms: dict[str, float]


class TrainingTiles:
    """Tiles and counts of the training cells, drawn uniformly, tiles in one of their eight rotations and reflections.

    Every draw depends on (seed, name, step) alone.

    Parameters
    ----------
    store: the tissue. rows: training cells, each with a whole tile.
    """

    def __init__(self, store: TissueStore, rows: np.ndarray, seed: int) -> None:
        self.store, self.rows, self.seed = store, np.asarray(rows, dtype=np.int64), seed

    def __len__(self) -> int:
        return len(self.rows)

    def choose(self, name: str, step: int, n: int) -> np.ndarray:
        """``[n]`` rows of the store, with replacement."""
        return self.rows[rng.stream(self.seed, name, step).integers(len(self.rows), size=n)]

    def pictures(self, chosen: np.ndarray, name: str, step: int) -> Tensor:
        """uint8 ``[n, H, W, 3]``; :func:`pixels_of` makes numbers of them where they are used."""
        elements = rng.stream(self.seed, f"{name} rotation", step).integers(8, size=len(chosen))
        tiles = self.store.tiles(chosen)
        for i, element in enumerate(elements):
            tiles[i] = np.rot90(tiles[i, :, ::-1] if element >= 4 else tiles[i], element % 4).copy()
        return torch.from_numpy(tiles)

    def counts(self, chosen: np.ndarray) -> sp.csr_matrix:
        """``[n, gene]`` raw counts."""
        return self.store.cells.counts[chosen]


def pixels_of(pictures: Tensor) -> Tensor:
    """uint8 ``[n, H, W, 3]`` -> float32 ``[n, 3, H, W]`` in [-1, 1], on the same device."""
    return from_uint8(pictures).contiguous()


def device_called(name: str) -> torch.device:
    """``cpu``, ``cuda``, or ``auto`` for a GPU where PyTorch finds one.

    Raises
    ------
    BadInput: ``cuda`` where PyTorch finds none, or another name.
    """
    if name not in DEVICES:
        raise BadInput(f"The device is {name!r}: choose one of {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("PyTorch finds no GPU here: choose the device auto or cpu, or install PyTorch with CUDA.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """``E (|grad D(x)| - 1)^2`` at ``x = mix real + (1 - mix) fake`` (Gulrajani et al. 2017, arXiv 1704.00028).

    Parameters
    ----------
    real, fake: ``[n, 3, H, W]``. mix: ``[n]`` in [0, 1].
    """
    between = torch.lerp(fake, real, mix[:, None, None, None]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1.0) ** 2).mean()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer down the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def wasserstein_step(
    critic: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    real: Tensor,
    fake: Tensor,
    fresh: Callable[[], Tensor],
    mix: Tensor,
    *,
    penalty: float,
    drift: float = 0.0,
) -> dict[str, Tensor]:
    """One step of ``critic`` and one of ``generator`` (WGAN-GP, Gulrajani et al. 2017, arXiv:1704.00028).

    Parameters
    ----------
    real, fake: pictures for the critic; fake ones without a gradient.
    fresh: draws the generator's pictures once the critic has moved.
    mix: ``[picture]`` in [0, 1], where on the way between the first real and fake ones the gradient is held to 1.
    penalty, drift: weights of the gradient penalty and of the mean squared score of real pictures.

    Returns
    -------
    Terms of the losses, each one number.
    """
    critic.requires_grad_(True)
    score_real, score_fake = critic(real), critic(fake)
    held = gradient_penalty(critic, real[: len(mix)], fake[: len(mix)], mix)
    loss = score_fake.mean() - score_real.mean() + penalty * held + drift * score_real.square().mean()
    descend(optimizers["critic"], loss)
    critic.requires_grad_(False)
    loss_generator = -critic(fresh()).mean()
    descend(optimizers["generator"], loss_generator)
    critic.requires_grad_(True)
    distance = score_real.mean() - score_fake.mean()
    return {"critic": loss, "distance": distance, "penalty": held, "generator": loss_generator}


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of the matrix products and convolutions in ``run()``, backward passes included."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        # Not PyTorch's FlopCounterMode: it follows modules, which second derivatives do not allow.
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            flops = flop_registry.get(func._overloadpacket)
            if flops is not None:
                self.total += flops(*args, **(kwargs or {}), out_val=out)
            return out

    with Counter() as counter:
        run()
    return counter.total // 2


class Rival(ABC):
    """A generator of tiles, trained like the others and judged by the same figures.

    Parameters
    ----------
    config: sizes and training. genes: of the training store, in the order in which expression is read.
    seed: of the first weights; the global random state is left as it was.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    conditional: ClassVar[bool]
    Config: ClassVar[type]
    drawing: ClassVar[tuple[str, ...]]
    """Networks that :meth:`generate` needs; the others are only trained against."""
    averaged: ClassVar[tuple[str, ...]]
    """Of these, the ones drawn with the moving average of their weights."""

    def __init__(self, config: Any = None, genes: Sequence[str] = (), seed: int = 0) -> None:
        self.config: Any = self.Config() if config is None else config
        self.genes = tuple(genes)
        self.seed = seed
        self.report: dict[str, Any] | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.stream(seed, "init", self.name).integers(2**63)))
            self.nets = nn.ModuleDict(self._build())
        self.average = nn.ModuleDict({name: copy.deepcopy(self.nets[name]) for name in self.averaged})
        self.average.requires_grad_(False).eval()

    # --- what a rival fills in ------------------------------------------------------------------------------------

    @abstractmethod
    def _build(self) -> dict[str, nn.Module]:
        """Fresh networks by name."""

    @abstractmethod
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam optimisers by name, over the parameters of ``self.nets``."""

    @abstractmethod
    def _batch(self, step: int, tiles: TrainingTiles) -> dict[str, Tensor]:
        """What a training step (from 0) reads and draws, on the CPU; every draw from a stream named by the step.

        It may run in a thread, some steps ahead of the weights, which it must not read.
        """

    @abstractmethod
    def _update(
        self, step: int, batch: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        """One training step in place, on the device of the networks and the batch; losses by name, a number each."""

    @abstractmethod
    def _draw(self, counts: sp.csr_matrix | None, seeds: Sequence[int]) -> Tensor:
        """``[n, 3, H, W]`` in [-1, 1]; ``counts [n, gene]`` in the order of ``genes``, None if not conditional."""

    def _fit_statistics(self, tiles: TrainingTiles) -> None:  # noqa: B027 - most have none
        """Statistics of the training cells, before the first step; none unless a rival needs some."""

    def _first_step_alike(self, step: int) -> int:
        """The first of the steps that compute what ``step`` computes; their cost is counted once."""
        return 0

    def _decay(self, step: int) -> float:
        """Of the moving average at a step: close to ``config.ema`` once there is something to average."""
        return min(self.config.ema, (1 + step) / (10 + step))

    # --- drawing --------------------------------------------------------------------------------------------------

    def net(self, name: str) -> nn.Module:
        """The network to draw with: its average where there is one."""
        return self.average[name] if name in self.average else self.nets[name]

    @torch.inference_mode()
    def generate(self, cells: Cells | None, seeds: Sequence[int]) -> np.ndarray:
        """Draw one picture per seed.

        Parameters
        ----------
        cells: ``[picture]`` whose niches are drawn; a rival that is not conditional ignores them.
        seeds: ``[picture]``; all noise of picture i comes from ``seeds[i]``.

        Returns
        -------
        uint8 ``[picture, tile_px, tile_px, 3]``.

        Raises
        ------
        BadInput: a conditional rival without cells, or cells that share no gene with its training data.
        """
        counts: sp.csr_matrix | None = None
        if self.conditional:
            if cells is None:
                raise BadInput(f"{self.title} draws from expression: give the cells.")
            if len(cells) != len(seeds):
                raise ValueError(f"{len(cells)} cells need as many seeds, got {len(seeds)}")
            counts = match_genes(cells, self.genes)
        for name in self.drawing:
            self.net(name).eval()
        side = self.config.tile_px
        out = np.empty((len(seeds), side, side, 3), dtype=np.uint8)
        for start in range(0, len(seeds), CHUNK):
            rows = range(start, min(start + CHUNK, len(seeds)))
            padded = [*rows, *[rows[-1]] * (CHUNK - len(rows))]
            pixels = self._draw(None if counts is None else counts[padded], [int(seeds[i]) for i in padded])
            out[rows.start : rows.stop] = to_uint8(pixels)[: len(rows)]
        return out

    # --- training -------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        store: TissueStore,
        rows: np.ndarray,
        budget: Budget,
        seed: int,
        out: str | Path,
        resume: bool = False,
        config: Any = None,
        device: str = "cpu",
        workers: int = 0,
    ) -> Iterator[Progress]:
        """Train on the tiles of ``rows``; yields after each step, and writes the rival to ``out`` at the end.

        The state after step k depends on neither the budget nor on how often the run was stopped and resumed (same
        machine, same number of threads): learning rates do not depend on the budget. On a GPU this holds up to
        rounding, since some of its sums have no fixed order; matrix products and convolutions there take inputs
        rounded to TF32 (10 bits of fraction) and add in float32, for the whole process.

        Parameters
        ----------
        store: the tissue. rows: training cells with whole tiles. budget: over all runs.
        out: folder of the rival; its checkpoint is ``out/.work``. resume: go on from there.
        config: an instance of ``cls.Config``; its defaults if None.
        device: as in :func:`device_called`; a run may go on on another device.
        workers: threads that prepare the next steps; 0: each step is prepared when it is due.

        Raises
        ------
        BadInput: no cells, a tile size that the store does not have, a checkpoint of another run, no such device, or
            fewer than 0 workers.
        """
        out, rows = Path(out), np.asarray(rows, dtype=np.int64)
        if not len(rows):
            raise BadInput("There is no cell to train on: give rows of cells with whole tiles.")
        if workers < 0:
            raise BadInput(f"The number of workers is {workers}: give 0 or more.")
        place = device_called(device)
        config = cls.Config() if config is None else config
        side = store.tiles(rows[:1]).shape[1]
        if config.tile_px != side:
            raise BadInput(f"tile_px is {config.tile_px}, the store's tiles have {side} px: set tile_px to {side}.")
        work = out / ".work" / "state.safetensors"
        if work.exists() and not resume:
            raise BadInput(f"{out} holds the work of another run: go on with --resume, or choose another --out.")
        rival = cls(config, [str(gene) for gene in store.cells.genes], seed)
        return rival._run(TrainingTiles(store, rows, seed), budget, out, work, place, workers)

    def _run(
        self, tiles: TrainingTiles, budget: Budget, out: Path, work: Path, device: torch.device, workers: int
    ) -> Iterator[Progress]:
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        self.nets.to(device)
        self.average.to(device)

        def prepare(step: int) -> dict[str, Tensor]:
            batch = self._batch(step, tiles)
            return {name: value.pin_memory() for name, value in batch.items()} if on_gpu else batch

        def sent(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

        identity = self._identity(tiles)
        optimizers = self._optimizers()
        step, macs, cpu_seconds, seconds, terms = 0, 0, 0.0, 0.0, {}
        cost: dict[int, int] = {}
        if work.exists():
            read = self._read_state(work, optimizers, identity)
            step, macs = int(read["step"]), int(read["macs"])
            cpu_seconds, seconds = float(read["cpu_seconds"]), float(read["seconds"])
            terms = json.loads(read["terms"])
        else:
            self._fit_statistics(tiles)
        with closing(ahead(prepare, itertools.count(step), workers)) as batches:
            while budget.spent(macs, cpu_seconds, step, seconds) < 1:
                alike = self._first_step_alike(step)
                if alike not in cost:
                    cost[alike] = self._cost(alike, sent(prepare(alike)))
                began = time.process_time(), time.monotonic()
                self.nets.train()
                losses = self._update(step, sent(next(batches)), optimizers)
                for name in self.averaged:
                    _follow(self.average[name], self.nets[name], self._decay(step))
                # Reading the losses waits for the GPU: once a step, and the clock then counts its work.
                values = torch.stack([value.detach() for value in losses.values()]).tolist()
                terms = dict(zip(losses, values, strict=True))
                step, macs = step + 1, macs + cost[alike]
                cpu_seconds += time.process_time() - began[0]
                seconds += time.monotonic() - began[1]
                spent = budget.spent(macs, cpu_seconds, step, seconds)
                if spent >= 1 or step % self.config.checkpoint_every == 0:
                    meta = {"identity": identity, "step": step, "macs": macs, "terms": json.dumps(terms)}
                    self._write_state(work, optimizers, {**meta, "cpu_seconds": cpu_seconds, "seconds": seconds})
                yield Progress(step, spent, macs, cpu_seconds, terms)
        self.nets.cpu()
        self.average.cpu()
        donor = tiles.store.cells.donor
        assert donor is not None
        self.report = {
            "data": tiles.store.path.name,
            **tiles.store.provenance,
            "learned_from": sorted({str(name) for name in donor[tiles.rows]}),
            "cells": len(tiles),
            "steps": step,
            "macs": macs,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "batch_size": self.config.batch_size,
            "terms": terms,
            "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in self.nets.items()},
        }
        self.save(out)

    def _cost(self, step: int, batch: Mapping[str, Tensor]) -> int:
        """Multiply-accumulates of a training step, taken on a copy."""
        probe = copy.deepcopy(self)
        optimizers = probe._optimizers()
        probe.nets.train()
        return count_macs(lambda: probe._update(step, batch, optimizers))

    def _identity(self, tiles: TrainingTiles) -> str:
        """Of what decides the result, the budget apart."""
        settings = {k: v for k, v in to_json(self.config).items() if k != "checkpoint_every"}
        text = json.dumps([SCHEMA, self.name, settings, self.seed, self.genes, tiles.store.identity])
        digest = hashlib.sha256(text.encode())
        digest.update(np.ascontiguousarray(tiles.rows).tobytes())
        digest.update(tiles.store.tiles(tiles.rows[:8]).tobytes())
        return digest.hexdigest()

    def _write_state(self, path: Path, optimizers: Mapping[str, torch.optim.Optimizer], meta: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        tensors = {f"nets.{k}": v for k, v in self.nets.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, optimizer in optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        with atomic_path(path) as temporary:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                temporary,
                metadata={k: str(v) for k, v in meta.items()},
            )

    def _read_state(self, path: Path, optimizers: Mapping[str, torch.optim.Optimizer], identity: str) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as handle:
                meta = handle.metadata()
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is damaged ({error}): start again in another --out.") from error
        if meta["identity"] != identity:
            raise BadInput(f"{path} was made with other data or settings: use the same, or choose another --out.")
        self.nets.load_state_dict(_below(tensors, "nets."))
        self.average.load_state_dict(_below(tensors, "average."))
        for name, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"optimizer.{name}.").items():
                index, _, field = key.partition(".")
                state.setdefault(int(index), {})[field] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        return meta

    # --- the folder -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``weights.safetensors`` and then ``rival.json``, each atomically."""
        from safetensors.torch import save_file

        folder = Path(folder)
        (folder / "rival.json").unlink(missing_ok=True)  # a half-written rival must not open
        weights = {f"{n}.{k}": v.contiguous() for n in self.drawing for k, v in self.net(n).state_dict().items()}
        with atomic_path(folder / "weights.safetensors") as temporary:
            save_file(weights, temporary)
        header = {
            "schema": SCHEMA,
            "rival": self.name,
            "config": to_json(self.config),
            "genes": list(self.genes),
            "seed": self.seed,
            "versions": {"torch": torch.__version__},
            "training": self.report,
        }
        write_json(folder / "rival.json", header)

    @classmethod
    def load(cls, folder: str | Path) -> Rival:
        """Read what :meth:`save` wrote; every weight must be there, and no other. It draws, it cannot be trained on.

        Raises
        ------
        BadInput: not a folder of this rival, another schema, or a missing, truncated or unfitting file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        header = read_header(folder)
        if header.get("rival") != cls.name:
            raise BadInput(f"{folder} holds {header.get('rival')!r}, not {cls.name!r}: open it with load_rival.")
        try:
            rival = cls(from_json(cls.Config, header["config"]), header["genes"], header["seed"])
            weights = load_file(folder / "weights.safetensors")
            unknown = [key for key in weights if key.split(".")[0] not in cls.drawing]
            if unknown:
                raise BadInput(f"{folder} holds the unknown weight {unknown[0]!r}: copy or train the rival again.")
            for name in cls.drawing:
                rival.net(name).load_state_dict(_below(weights, f"{name}."))
        except BadInput:
            raise
        except FileNotFoundError as error:
            raise BadInput(f"{folder} lacks weights.safetensors: copy it whole, or train the rival again.") from error
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise BadInput(f"The rival in {folder} is damaged ({reason}): copy or train it again.") from error
        rival.report = header.get("training")
        return rival


def read_header(folder: Path) -> dict[str, Any]:
    """``rival.json`` of a folder.

    Raises
    ------
    BadInput: no such file, not JSON, or another schema.
    """
    path = folder / "rival.json"
    if not path.is_file():
        raise BadInput(f"{folder} holds no rival (no rival.json): give the folder that `train-rival` wrote.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        schema = header["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error}): copy or train the rival again.") from error
    if schema != SCHEMA:
        raise BadInput(f"{path} has schema {schema!r}, this version reads {SCHEMA}: train the rival again.")
    return header


def match_genes(cells: Cells, genes: Sequence[str]) -> sp.csr_matrix:
    """Counts ``[cell, gene]`` in the order of ``genes``; columns of one symbol are added, absent genes are 0.

    Raises
    ------
    BadInput: no gene in common.
    """
    import scipy.sparse as sp

    position = {gene: i for i, gene in enumerate(genes)}
    columns = np.array([position.get(str(gene), -1) for gene in cells.genes])
    known = np.flatnonzero(columns >= 0)
    if not len(known):
        raise BadInput(f"The cells share none of the {len(genes)} genes of the training data: give gene symbols.")
    select = sp.csr_matrix(
        (np.ones(len(known), dtype=np.float32), (known, columns[known])), shape=(len(columns), len(genes))
    )
    return sp.csr_matrix(cells.counts @ select)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def _follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the average towards the network: parameters and running statistics; whole numbers are copied."""
    for old, new in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)
