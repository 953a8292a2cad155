"""The command: ``python -m ge2hist_core evaluate BUNDLE DATA.zarr --out DIR [--rivals DIR ...] [--quick]``.

Writes ``evaluation.json``, ``evaluation.md`` and ``evaluation.html`` into ``DIR``. What is drawn is kept in
``DIR/.work/evaluation``: a run that was stopped goes on, and a rival that comes later costs its own pictures alone.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from ge2hist_core.config import SampleConfig
from ge2hist_core.evaluation.report import html, markdown, summary
from ge2hist_core.evaluation.run import QUICK, Counts, evaluate
from ge2hist_core.files import atomic_path, write_json

__all__ = ["add_arguments", "counts_of", "main"]

_HELP = {
    "tiles": "cells whose niche each method draws",
    "reference_tiles": "tiles also drawn with 1000 DDPM steps",
    "edit_cells": "cells on which driver programmes are edited",
    "type_pictures": "pictures per cell type drawn from its mixture (Figure 4)",
    "training_cells": "cells of training donors for retrieval, probes and read-back",
    "classified_cells": "held-out cells to classify",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA.zarr")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for evaluation.json, .md, .html")
    parser.add_argument(
        "--rivals",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders that `train-rival` wrote; a bundle among them is shown beside, out of the contest",
    )
    parser.add_argument("--quick", action="store_true", help="few of everything; intervals are wide")
    for field in fields(Counts):
        usual = "all" if field.default is None else field.default
        text = f"{_HELP[field.name]} (default {usual}, {getattr(QUICK, field.name)} with --quick)"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="Inception-v3 weights of torch-fidelity, for KID"
    )
    parser.add_argument(
        "--lpips", type=Path, nargs=2, metavar=("ALEXNET", "LINEAR"),
        help="AlexNet weights of torchvision and alex.pth of lpips v0.1",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=SampleConfig().steps)
    parser.add_argument("--guidance", type=float, default=SampleConfig().guidance)
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    model = GE2Hist.load(args.bundle)
    result = evaluate(
        model,
        TissueStore(args.data, model.config.tile_px),
        counts_of(args),
        seed=args.seed,
        sample=SampleConfig(steps=args.steps, guidance=args.guidance),
        rival_folders=args.rivals,
        inception=args.inception,
        lpips=None if args.lpips is None else (args.lpips[0], args.lpips[1]),
        work=args.out / ".work" / "evaluation",
    )
    result = without_nan(result)
    write_json(args.out / "evaluation.json", result)
    for name, text in (("evaluation.md", markdown(result)), ("evaluation.html", html(result))):
        with atomic_path(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(summary(result))


def counts_of(args: argparse.Namespace) -> Counts:
    """What was asked for; what was not, as usual, but never more than ``--tiles`` of what is chosen among the tiles."""
    usual = QUICK if args.quick else Counts()
    given = {f.name: getattr(args, f.name) for f in fields(Counts)}
    tiles = usual.tiles if given["tiles"] is None else given["tiles"]
    values = {name: getattr(usual, name) if n is None else n for name, n in given.items()}
    for name in ("reference_tiles", "edit_cells", "type_pictures"):
        if given[name] is None:
            values[name] = max(0, min(values[name], tiles))
    return Counts(**values)


def without_nan(value: Any) -> Any:
    """The same nested value with None, which JSON has, for numbers that are not finite, which it has not."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
