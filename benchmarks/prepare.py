"""What does `prepare` cost, and how does that grow with the slide? ``python benchmarks/prepare.py [--mosaics 2 4 8]``.

For each mosaic of N x N sections of 512 um: a Visium HD folder of known truth is written, `prepare` is run on it in a
process of its own, and its seconds, peak memory (all children) and microseconds per 2-um bin under tissue are printed;
then the exponent of seconds against bins, 1 for a cost that grows in proportion. Run on an otherwise idle machine; a
mosaic of 13 x 13 has about 11 million bins.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SECTION_UM = 512.0
BIN_UM = 2.0


def measured(n: int, folder: Path, extra_genes: int) -> dict[str, float]:
    """Seconds, peak MiB and bins of one mosaic."""
    slide, out = folder / f"slide{n}", folder / f"data{n}.zarr"

    def command(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "ge2hist_core", *words], cwd=ROOT, check=True)

    command(
        "simulate-slide", str(slide), "--seed", "1", "--rows", str(n), "--columns", str(n),
        "--section-um", f"{SECTION_UM:g}", "--distinct", "4", "--extra-genes", str(extra_genes),
        "--compression", "jpeg",
    )  # fmt: skip
    image = next(path for path in sorted(slide.rglob("*")) if path.suffix in (".tif", ".tiff", ".btf"))
    start = time.perf_counter()
    command("prepare", str(slide), "--image", str(image), "--out", str(out))
    seconds = time.perf_counter() - start
    # Of the largest child so far: mosaics are measured from small to large.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"bins": (n * SECTION_UM / BIN_UM) ** 2, "seconds": seconds, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mosaics", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--extra-genes", type=int, default=17_000, help="genes without expression, as a real slide has")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sorted(args.mosaics):
            rows.append(measured(n, Path(folder), args.extra_genes))
            row = rows[-1]
            print(
                f"{row['bins']:>12,.0f} bins {row['seconds']:>8.1f} s {row['peak_mib']:>8.0f} MiB "
                f"{1e6 * row['seconds'] / row['bins']:>8.1f} us per bin",
                flush=True,
            )
    figures: dict[str, object] = {"mosaics": rows}
    if len(rows) > 1:
        bins, seconds = (np.log([row[name] for row in rows]) for name in ("bins", "seconds"))
        figures["exponent"] = float(np.polyfit(bins, seconds, 1)[0])
        print(f"seconds grow with bins to the power of {figures['exponent']:.2f}")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
