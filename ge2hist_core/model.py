"""GE2Hist: the trained parts together, from expression to picture, and the folder ("bundle") that holds them.

Bundle: ``bundle.json`` (format, sizes, versions, report of the training), ``scgpt/`` (official layout),
``vae.safetensors``, ``autoencoder.safetensors``, ``unet/`` and ``scheduler/`` (diffusers), ``mixture.safetensors``,
``support.safetensors``, and, once trained, the nuclei reader, once fitted, ``gates.safetensors`` and ``gates.json``.
Nothing in it is executed on loading.

Same picture in any batch. Convolutions and matrix products on a CPU choose their algorithm, and with it the order of
summation, by batch size: the network's outputs differ by about 2e-6 between sizes 1, 2, 4, 8 (within one size,
neither a picture's position nor its neighbours matter). Pictures are therefore always drawn in chunks of exactly
``CHUNK``, the last one padded with copies. Four is the size at which a picture costs least, about 60 % of its cost in
a chunk of two, while a single pair in it costs only a fifth more than in a chunk of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ge2hist_core import rng
from ge2hist_core.autoencoder import TileAutoencoder
from ge2hist_core.config import VISIBLE_CLASS, ModelConfig, SampleConfig, from_json, to_json
from ge2hist_core.denoiser import Denoiser, Guided
from ge2hist_core.files import atomic_folder, atomic_path, parse_json, sha256_file, write_json
from ge2hist_core.sampler import sample
from ge2hist_core.support import Support
from ge2hist_core.types import BadInput, Cells, Latent
from ge2hist_core.vae import Mixture, StateEncoder

if TYPE_CHECKING:
    from ge2hist_core.embedding import ScGPT
    from ge2hist_core.gates import Gates
    from ge2hist_core.nuclei import LearnedReader
    from ge2hist_core.store import TissueStore

__all__ = ["CHUNK", "FORMAT", "GATE_FILES", "GE2Hist", "Preview"]

FORMAT = 3
READS = (2, 3)
"""In format 2 the niche VAE saw the whole embedding: its statistics of types are 0 and 1."""
CHUNK = 4
GATE_FILES = ("gates.json", "gates.safetensors")
"""In the order in which they are removed: without the first the second is not looked at."""

_ENCODER_FILES = ("args.json", "vocab.json", "best_model.pt")
_HASHED = (
    "bundle.json",
    "*.safetensors",
    "reader.json",
    "gates.json",
    *(f"scgpt/{name}" for name in _ENCODER_FILES),
    "unet/*",
    "scheduler/*",
)
"""Files that can change a result, and so make up the bundle's hash."""


@dataclass(frozen=True, eq=False)
class Preview:
    """The pictures under way: ``rows`` of the request that this chunk draws and their current clean latents."""

    rows: range
    latents: Tensor
    autoencoder: TileAutoencoder

    def images(self) -> np.ndarray:
        """uint8 ``[len(rows), H, W, 3]``: the current estimates as pictures."""
        return self.autoencoder.decode(self.latents)[: len(self.rows)]


OnPicture = Callable[[int, int, Preview], "bool | None"]
"""``(i, n, preview)``: network call i of n (from 1, over all pictures) is done. True stops the run."""


@dataclass(eq=False)
class GE2Hist:
    """A model of tissue: expression -> state -> picture -> nuclei.

    Make one with :meth:`load`, or :meth:`untrained` and ``ge2hist_core.training``.

    Parameters
    ----------
    config: sizes. scgpt: the cell encoder; scgpt_folder: where its files are, to be copied on :meth:`save`.
    mixture, support: None until fitted. reader: None until trained.
    report: figures of the training, plain JSON.
    folder: the bundle it was loaded from or saved to.
    gates: fitted on exactly these weights and this reader: whoever changes one sets them to None. None until fitted.
    """

    config: ModelConfig
    scgpt: ScGPT
    scgpt_folder: Path
    encoder: StateEncoder
    autoencoder: TileAutoencoder
    denoiser: Denoiser
    mixture: Mixture | None = None
    support: Support | None = None
    reader: LearnedReader | None = None
    report: dict[str, Any] | None = None
    folder: Path | None = None
    gates: Gates | None = None

    def __post_init__(self) -> None:
        if self.scgpt.dim != self.config.embedding_dim:
            raise BadInput(
                f"The encoder gives {self.scgpt.dim} numbers per cell, the model expects {self.config.embedding_dim}: "
                "use the encoder that the model was trained with."
            )
        part: Any  # the stubs of Module.to do not know memory_format
        for part in (self.encoder, self.autoencoder, self.denoiser):
            part.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # about a tenth faster

    @classmethod
    def untrained(cls, config: ModelConfig, scgpt_folder: str | Path, seed: int = 0) -> GE2Hist:
        """Random weights, drawn from ``seed``; the global random state is left as it was."""
        from ge2hist_core.embedding import ScGPT

        scgpt = ScGPT.load(scgpt_folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.stream(seed, "init").integers(2**63)))
            parts = StateEncoder(config), TileAutoencoder(config), Denoiser(config)
        return cls(config, scgpt, Path(scgpt_folder), *parts)

    @property
    def cell_types(self) -> tuple[str, ...]:
        return self.config.cell_types

    def has_learned_from(self, store: TissueStore, parts: Sequence[str] = ("train", "validation")) -> set[str]:
        """Donors of a store that this model, one that it started from, its encoder or its reader was trained on.

        The same donors are those of the same store, or simulated from the same seed: whatever the section's size, a
        simulated donor's genes and stain depend on seed and number alone.

        Parameters
        ----------
        parts: of the split, ``train`` and ``validation``.
        """
        reports = [self.scgpt_report, self.reader.figures.get("learned_from") if self.reader is not None else None]
        report = self.report
        while report:
            reports.append(report)
            report = (report.get("started_from") or {}).get("training")
        known: set[str] = set()
        for report in reports:
            simulation = (report or {}).get("simulation")
            same_seed = store.simulation and simulation and store.simulation["seed"] == simulation["seed"]
            if report and (same_seed or report.get("store") == store.identity):
                known.update(*(report.get("donors", {}).get(part, ()) for part in parts))
        return known & set(store.donors)

    @property
    def scgpt_report(self) -> dict[str, Any] | None:
        """What the encoder was pre-trained on, None for published checkpoints, which do not say it by donor."""
        path = self.scgpt_folder / "pretraining.json"
        return parse_json(path.read_bytes(), str(path), "copy it again").get("learned_from") if path.is_file() else None

    # --- expression to state ---------------------------------------------------------------------------------

    def embed(self, cells: Cells, seed: int) -> np.ndarray:
        """scGPT embedding, unit length, ``[cell, embedding_dim]`` float32; see :meth:`ScGPT.embed`."""
        return self.scgpt.embed(cells, seed)

    @torch.inference_mode()
    def encode(self, embedding: np.ndarray) -> Latent:
        """Posterior means of ``z_c`` and ``z_e`` for embeddings ``[cell, embedding_dim]``."""
        # Cell by cell: a matrix product's rounding depends on the number of rows.
        pairs = [self.encoder(row[None]) for row in torch.from_numpy(np.ascontiguousarray(embedding, dtype=np.float32))]
        z_c, z_e = (
            np.stack([q[part].loc[0].numpy() for q in pairs]) if pairs else np.empty((0, d), np.float32)
            for part, d in enumerate((self.config.d_c, self.config.d_e))
        )
        return Latent(z_c, z_e)

    @torch.inference_mode()
    def classify(self, latent: Latent) -> np.ndarray:
        """Probabilities of the cell types from ``z_c``, ``[cell, type]`` float32."""
        logits = self.encoder.type_vae.logits(torch.from_numpy(latent.z_c))
        return logits.softmax(-1).numpy()

    @torch.inference_mode()
    def expected_neighbours(self, latent: Latent) -> np.ndarray:
        """Other nuclei of each of ``cell_types`` that the niche network expects in the tile, ``[cell, type]`` float64.

        The square of the expected root count, at least 0: a quick guess from the state alone, without a picture.

        Raises
        ------
        BadInput: a bundle whose training did not note the scale of its counts.
        """
        scale = (self.report or {}).get("neighbours")
        if not scale:
            raise BadInput("This bundle cannot guess a niche without drawing it: train it again with this version.")
        mean, std = (np.array([scale[name][key] for name in self.cell_types]) for key in ("root_mean", "root_std"))
        states = torch.from_numpy(latent.z_c), torch.from_numpy(latent.z_e)
        root = self.encoder.niche_vae.expected_neighbours(*states).double().numpy() * std + mean
        return np.maximum(root, 0.0) ** 2

    def expected_readouts(self, latent: Latent) -> dict[str, np.ndarray]:
        """Readout -> ``[cell]`` from :meth:`expected_neighbours`: ``density`` (cells per mm2, the cell itself included)
        and ``fraction:<class>`` of the neighbours, over the classes that H&E can tell apart.
        """
        counts = self.expected_neighbours(latent)
        total = counts.sum(axis=1)
        area_mm2 = (self.config.tile_px * self.config.um_per_px / 1000.0) ** 2
        visible = np.array([VISIBLE_CLASS.get(name, name) for name in self.cell_types], dtype=object)
        fractions = {
            f"fraction:{name}": counts[:, visible == name].sum(axis=1) / np.maximum(total, 1e-9)
            for name in dict.fromkeys(visible)
        }
        return {"density": (total + 1) / area_mm2} | fractions

    def sample_type(self, cell_type: str, n: int, seed: int) -> np.ndarray:
        """``z_c [n, d_c]`` drawn from a type's mixture: the second way to condition, (3).

        Raises
        ------
        BadInput: a type that the model does not know, or no mixture fitted yet.
        """
        if cell_type not in self.cell_types:
            raise BadInput(f"Cell type {cell_type!r} is unknown: choose one of {', '.join(self.cell_types)}.")
        if self.mixture is None:
            raise BadInput("This bundle has no mixture of cell types: finish its training with `train --resume`.")
        return self.mixture.sample(self.cell_types.index(cell_type), n, seed)

    def sample_environment(self, n: int, seed: int) -> np.ndarray:
        """``z_e [n, d_e]`` from its prior N(0, I); row i depends on (seed, i) alone."""
        rows = [rng.normal(seed, "z_e", (self.config.d_e,), i).numpy() for i in range(n)]
        return np.stack(rows) if rows else np.empty((0, self.config.d_e), np.float32)

    # --- state to picture ------------------------------------------------------------------------------------

    def generate(
        self,
        latent: Latent,
        seeds: Sequence[int],
        config: SampleConfig = SampleConfig(),  # noqa: B008 - frozen
        on_step: OnPicture | None = None,
    ) -> np.ndarray:
        """Draw one picture per state.

        Parameters
        ----------
        latent: ``[picture]`` states. seeds: ``[picture]``; x_T and step noise of picture i come from ``seeds[i]``
            alone, so equal seeds share all noise and a picture is the same in a batch of any size.
        on_step: see :data:`OnPicture`; True stops by raising :class:`ge2hist_core.sampler.Stopped`.

        Returns
        -------
        uint8 ``[picture, tile_px, tile_px, 3]``.
        """
        n = len(latent)
        if len(seeds) != n:
            raise ValueError(f"{n} states need as many seeds, got {len(seeds)}")
        net = self.denoiser if config.guidance == 1 else Guided(self.denoiser, config.guidance)
        size = (self.config.latent_channels, self.config.latent_px, self.config.latent_px)
        side = self.config.tile_px
        out = np.empty((n, side, side, 3), dtype=np.uint8)
        starts = range(0, n, CHUNK)
        total = len(starts) * config.steps
        for done, start in enumerate(starts):
            rows = range(start, min(start + CHUNK, n))
            padded = [*rows, *[rows[-1]] * (CHUNK - len(rows))]
            chunk_seeds = [int(seeds[i]) for i in padded]

            def draw(name: str, *index: int, of: list[int] = chunk_seeds) -> Tensor:
                return torch.stack([rng.normal(seed, name, size, *index) for seed in of])

            def report(i: int, _: int, estimate: Tensor, rows: range = rows, before: int = done * config.steps) -> bool:
                preview = Preview(rows, estimate, self.autoencoder)
                return bool(on_step and on_step(before + i, total, preview))

            latents = sample(
                net,
                draw("x_T"),
                torch.from_numpy(latent.z_s[padded]),
                config,
                step_noise=partial(draw, "step"),
                on_step=report if on_step else None,
                train_timesteps=self.config.train_timesteps,
            )
            out[rows.start : rows.stop] = self.autoencoder.decode(latents)[: len(rows)]
        return out

    def read_nuclei(self, images: np.ndarray) -> list[pd.DataFrame]:
        """Nuclei of pictures uint8 ``[n, H, W, 3]`` at the model's scale; one table per picture.

        Raises
        ------
        BadInput: the bundle has no reader.
        """
        if self.reader is None:
            raise BadInput("This bundle has no nuclei reader: train one with `python -m ge2hist_core train-reader`.")
        return self.reader.read(images, self.config.um_per_px)

    # --- the folder -------------------------------------------------------------------------------------------

    @cached_property
    def sha256(self) -> str:
        """Hash of the bundle's files that can change a result.

        Raises
        ------
        ValueError: the model was neither loaded nor saved.
        """
        if self.folder is None:
            raise ValueError("an unsaved model has no hash: save it first")
        files = sorted({path for pattern in _HASHED for path in self.folder.glob(pattern) if path.is_file()})
        lines = [f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}\n" for path in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write every part, each atomically and ``bundle.json`` last; other files in the folder stay.

        Gates that lie there from before, of other weights, are removed.
        """
        import diffusers
        from diffusers import DDPMScheduler

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bundle.json").unlink(missing_ok=True)  # a half-written bundle must not open
        if not (folder / "scgpt").exists() or not self.scgpt_folder.samefile(folder / "scgpt"):
            with atomic_folder(folder / "scgpt") as temporary:
                for name in _ENCODER_FILES:
                    shutil.copyfile(self.scgpt_folder / name, temporary / name)
                if (self.scgpt_folder / "pretraining.json").exists():  # ours has one, published checkpoints do not
                    shutil.copyfile(self.scgpt_folder / "pretraining.json", temporary / "pretraining.json")
        for name, part in (("vae", self.encoder), ("autoencoder", self.autoencoder)):
            _save_arrays(folder / f"{name}.safetensors", {k: v.numpy() for k, v in part.state_dict().items()})
        self.denoiser.save(folder / "unet")
        with atomic_folder(folder / "scheduler") as temporary:
            DDPMScheduler(
                num_train_timesteps=self.config.train_timesteps,
                beta_schedule="squaredcos_cap_v2",
                prediction_type="v_prediction",
                clip_sample=False,
                timestep_spacing="trailing",
            ).save_pretrained(temporary)
        if self.mixture is not None:
            _save_arrays(folder / "mixture.safetensors", vars(self.mixture))
        if self.support is not None:
            names = np.frombuffer(json.dumps(self.support.cell_id.tolist()).encode(), dtype=np.uint8)
            _save_arrays(folder / "support.safetensors", {**vars(self.support), "cell_id": names})
        if self.reader is not None:
            self.reader.save(folder)
        if self.gates is not None:
            self.gates.save(folder)
        else:
            for name in GATE_FILES:
                (folder / name).unlink(missing_ok=True)
        header = {
            "format": FORMAT,
            "config": to_json(self.config),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "training": self.report,
        }
        write_json(folder / "bundle.json", header)
        self.folder = folder
        self.__dict__.pop("sha256", None)

    @classmethod
    def load(cls, folder: str | Path, *, gates: bool = True) -> GE2Hist:
        """Open a bundle.

        Parameters
        ----------
        gates: False leaves them aside, as who fits them anew does: gates of earlier weights do not open.

        Raises
        ------
        BadInput: not a bundle, one of another format, or a missing, truncated or unfitting file.
        """
        from ge2hist_core.embedding import ScGPT

        folder = Path(folder)
        header = _header(folder)
        config = from_json(ModelConfig, header["config"])
        with torch.random.fork_rng(devices=[]):
            encoder, autoencoder = StateEncoder(config), TileAutoencoder(config)
            since = {"type_mean", "residual_std"} if header["format"] == 2 else set()
            _load_weights(encoder, folder / "vae.safetensors", since)
            _load_weights(autoencoder, folder / "autoencoder.safetensors")
            with _explained(folder / "unet"):
                denoiser = Denoiser.load(folder / "unet", config)
        mixture = support = reader = None
        if (folder / "mixture.safetensors").exists():
            mixture = Mixture(**_load_arrays(folder / "mixture.safetensors"))
        if (folder / "support.safetensors").exists():
            arrays = _load_arrays(folder / "support.safetensors")
            names = json.loads(arrays.pop("cell_id").tobytes())
            support = Support(cell_id=np.array(names, dtype=object), **arrays)
        if (folder / "reader.safetensors").exists():
            from ge2hist_core.nuclei import LearnedReader

            reader = LearnedReader.load(folder)
        scgpt = ScGPT.load(folder / "scgpt")
        return cls(
            config, scgpt, folder / "scgpt", encoder, autoencoder, denoiser, mixture, support, reader,
            header.get("training"), folder, _load_gates(folder) if gates else None,
        )  # fmt: skip


def _load_gates(folder: Path) -> Gates | None:
    from ge2hist_core.gates import Gates

    return Gates.load(folder)


def _header(folder: Path) -> dict[str, Any]:
    path = folder / "bundle.json"
    if not path.is_file():
        raise BadInput(f"{folder} is not a GE2Hist bundle (no bundle.json): give the folder that `train` wrote.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        found = header["format"]
        header["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({error}): copy or train the bundle again.") from error
    if found not in READS:
        raise BadInput(f"{path} has bundle format {found!r}, this version reads {FORMAT}: train the bundle again.")
    return header


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what libraries raise over a bad weights file into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"The bundle lacks {error.filename or path}: copy it whole, or train it again.") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise BadInput(f"{path} is truncated or damaged ({error}): copy the bundle again.") from error
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise BadInput(f"{path} does not fit the sizes in bundle.json ({first}): copy the bundle again.") from error


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    with _explained(path):
        return load_file(path)


def _load_weights(part: nn.Module, path: Path, since: Collection[str] = ()) -> None:
    """``since``: names that a file of an older format lacks; they stay as they are."""
    state = {name: value for name, value in part.state_dict().items() if name in since}
    state |= {name: torch.from_numpy(array) for name, array in _load_arrays(path).items()}
    with _explained(path):
        part.load_state_dict(state)
