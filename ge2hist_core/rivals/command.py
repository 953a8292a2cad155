"""``python -m ge2hist_core train-rival RIVAL DATA.zarr --out DIR``: train one of the paper's competitors.

It learns from the store's training donors, from the cells that ``train`` takes for the same seed.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from ge2hist_core.config import TrainConfig
from ge2hist_core.rivals import RIVALS, rival_class
from ge2hist_core.rivals.common import DEVICES, Budget
from ge2hist_core.types import BadInput

__all__ = ["add_arguments", "main"]

DEFAULT_MINUTES = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("data", type=Path, metavar="DATA.zarr")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the trained rival")
    parser.add_argument(
        "--minutes", type=float, metavar="M",
        help=f"CPU minutes of training, over cores and resumed runs (default {DEFAULT_MINUTES:g} without a limit)",
    )  # fmt: skip
    parser.add_argument("--tera-macs", type=float, metavar="T", help="10^12 multiply-accumulates, over resumed runs")
    parser.add_argument("--wall-minutes", type=float, metavar="M", help="minutes by the clock, over resumed runs")
    parser.add_argument("--seed", type=int, default=TrainConfig().seed)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures per step")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that load ahead; 0 for none")
    parser.add_argument("--cells-per-donor", type=int, default=TrainConfig().cells_per_donor, metavar="N")
    parser.add_argument("--resume", action="store_true", help="go on with the work in DIR")


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ge2hist_core.store import TissueStore
    from ge2hist_core.training import limited_rows

    limits = {"--minutes": args.minutes, "--tera-macs": args.tera_macs, "--wall-minutes": args.wall_minutes}
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise BadInput(f"{name} is {value}: give a number above 0.")
    minutes = DEFAULT_MINUTES if all(value is None for value in limits.values()) else args.minutes
    for name, value in (("--cells-per-donor", args.cells_per_donor), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}: give at least 1.")
    cls, store = rival_class(args.rival), TissueStore(args.data)
    config = cls.Config() if args.batch_size is None else replace(cls.Config(), batch_size=args.batch_size)
    taken = TrainConfig(cells_per_donor=args.cells_per_donor, seed=args.seed)
    rows = limited_rows(store, store.rows(store.split()["train"]), taken)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    budget = Budget(
        macs=None if args.tera_macs is None else 1e12 * args.tera_macs,
        cpu_seconds=None if minutes is None else 60 * minutes,
        seconds=None if args.wall_minutes is None else 60 * args.wall_minutes,
    )
    run = cls.train(
        store, rows, budget, args.seed, args.out, args.resume, config, device=args.device, workers=args.workers
    )
    with tqdm(total=100.0, desc=cls.title, unit="%", bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}") as bar:
        for progress in run:
            bar.update(min(100.0, 100.0 * progress.spent) - bar.n)
            bar.set_postfix({"step": progress.step, **{k: f"{v:.3f}" for k, v in progress.terms.items()}})
    report = json.loads((args.out / "rival.json").read_text(encoding="utf-8"))["training"]
    shown = ("steps", "cells", "batch_size", "macs", "cpu_seconds", "seconds", "threads", "device")
    print(json.dumps({k: report[k] for k in shown}, indent=1))
