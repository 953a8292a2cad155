"""``python -m ge2hist_core train-rival RIVAL DATA.zarr --out DIR``: train one of the paper's competitors.

It learns from the store's training donors, from the cells that ``train`` takes for the same seed.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ge2hist_core.config import TrainConfig
from ge2hist_core.rivals import RIVALS, rival_class
from ge2hist_core.rivals.common import Budget, limited_rows
from ge2hist_core.types import BadInput

__all__ = ["add_arguments", "main"]

DEFAULT_MINUTES = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("data", type=Path, metavar="DATA.zarr")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the trained rival")
    parser.add_argument(
        "--minutes", type=float, metavar="M",
        help=f"CPU minutes of training, over cores and resumed runs (default {DEFAULT_MINUTES:g} without --tera-macs)",
    )  # fmt: skip
    parser.add_argument("--tera-macs", type=float, metavar="T", help="10^12 multiply-accumulates, over resumed runs")
    parser.add_argument("--seed", type=int, default=TrainConfig().seed)
    parser.add_argument("--cells-per-donor", type=int, default=TrainConfig().cells_per_donor, metavar="N")
    parser.add_argument("--resume", action="store_true", help="go on with the work in DIR")


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ge2hist_core.store import TissueStore

    for name, value in (("--minutes", args.minutes), ("--tera-macs", args.tera_macs)):
        if value is not None and not value > 0:
            raise BadInput(f"{name} is {value}: give a number above 0.")
    minutes = DEFAULT_MINUTES if args.minutes is None and args.tera_macs is None else args.minutes
    if args.cells_per_donor < 1:
        raise BadInput(f"--cells-per-donor is {args.cells_per_donor}: give at least 1.")
    cls, store = rival_class(args.rival), TissueStore(args.data)
    rows = limited_rows(store, store.split()["train"], args.cells_per_donor, args.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    budget = Budget(
        macs=None if args.tera_macs is None else 1e12 * args.tera_macs,
        cpu_seconds=None if minutes is None else 60 * minutes,
    )
    with tqdm(total=100.0, desc=cls.title, unit="%", bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}") as bar:
        for progress in cls.train(store, rows, budget, args.seed, args.out, args.resume):
            bar.update(min(100.0, 100.0 * progress.spent) - bar.n)
            bar.set_postfix({"step": progress.step, **{k: f"{v:.3f}" for k, v in progress.terms.items()}})
    report = json.loads((args.out / "rival.json").read_text(encoding="utf-8"))["training"]
    print(json.dumps({k: report[k] for k in ("steps", "cells", "macs", "cpu_seconds", "seconds", "threads")}, indent=1))
