"""``python -m ge2hist_core simulate --donors N --seed S OUT.zarr``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.store import SectionRecord

__all__ = ["add_arguments", "main", "section_record", "simulate_sections"]


def section_record(seed: int, donor: int, size_um: float) -> SectionRecord:
    """One donor's section as the store writes it: picture, masks, nuclei and counts."""
    import numpy as np

    from ge2hist_core.simulator.expression import draw_counts, load_genes
    from ge2hist_core.simulator.programmes import PROGRAMMES
    from ge2hist_core.simulator.rendering import render
    from ge2hist_core.simulator.tissue import simulate_section
    from ge2hist_core.store import SectionRecord

    section = simulate_section(seed, donor, size_um)
    image, labels = render(section, seed)
    nuclei = section.nuclei.assign(area_um2=np.pi / 4 * section.nuclei["major_um"] * section.nuclei["minor_um"])
    xy = nuclei[["x_um", "y_um"]].to_numpy()
    for name in PROGRAMMES:
        nuclei[f"programme_{name}"] = section.at(name, xy)
    return SectionRecord(section.donor_name, image, labels, nuclei, draw_counts(section, load_genes()))


def simulate_sections(seed: int, donors: range, size_um: float) -> Iterator[SectionRecord]:
    """Sections of the given donors one by one, with a progress bar."""
    from tqdm import tqdm

    for donor in tqdm(donors, unit="section", desc="simulate"):
        yield section_record(seed, donor, size_um)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT.zarr")
    parser.add_argument("--donors", type=int, default=40, help="number of donors, one section each")
    parser.add_argument("--first-donor", type=int, default=0, help="number of the first donor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is at OUT.zarr")
    parser.add_argument("--size-um", type=float, default=512.0, help="side of a section in um")


def main(args: argparse.Namespace) -> None:
    import pandas as pd

    from ge2hist_core.simulator.expression import load_genes
    from ge2hist_core.store import write_store

    if args.donors < 1:
        raise BadInput(f"--donors is {args.donors}: give at least 1.")
    if args.out.exists() and not args.overwrite:
        raise BadInput(f"{args.out} exists: give another name, or --overwrite to replace it.")
    donors = range(args.first_donor, args.first_donor + args.donors)
    simulation = {"seed": args.seed, "donors": list(donors), "size_um": args.size_um}
    table = load_genes()
    genes = pd.DataFrame({"role": table.role, "programme": table.programme}, index=pd.Index(table.symbols))
    write_store(args.out, simulate_sections(args.seed, donors, args.size_um), genes, simulation=simulation)
