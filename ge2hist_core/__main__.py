"""``python -m ge2hist_core COMMAND``: the engine from the command line.

Each command is a module with ``add_arguments(parser)`` and ``main(args)``, imported when its command runs. ``main`` may
return an exit code of its own.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence

from ge2hist_core.types import BadInput

COMMANDS = {
    "prepare": ("ge2hist_core.prepare", "make a store of a Space Ranger folder and its H&E"),
    "simulate-slide": ("ge2hist_core.simulator.space_ranger", "write a known-truth slide as a Space Ranger folder"),
    "simulate": ("ge2hist_core.simulator.command", "write a known-truth tissue as a SpatialData store"),
    "pretrain": ("ge2hist_core.pretraining", "train a small scGPT on the cells of a store"),
    "embed": ("ge2hist_core.embedding", "write scGPT embeddings of an h5ad's cells"),
    "encode": ("ge2hist_core.encoding", "write state, type and support of an h5ad's cells, as a bundle reads them"),
    "train": ("ge2hist_core.training", "train a GE2Hist bundle on a store"),
    "train-decoder": ("ge2hist_core.decoder_training", "give the pictures of a bundle grain and fine texture"),
    "train-reader": ("ge2hist_core.nuclei_training", "train the nuclei reader of a bundle on a store"),
    "train-rival": ("ge2hist_core.rivals.command", "train one of the paper's competitors on a store"),
    "gates": ("ge2hist_core.gates", "fit the gates that say whether a cell is inside a bundle's data"),
    "demo-cells": ("ge2hist_core.demo_cells", "write example cells of donors that a bundle has not seen"),
    "real-tiles": ("ge2hist_core.real_tiles", "keep some training tiles in a bundle, to stand beside generated ones"),
    "card": ("ge2hist_core.model_card", "write a bundle's model card from its figures"),
    "evaluate": ("ge2hist_core.evaluation.command", "compare a bundle's pictures with real tiles of the same cells"),
}


def run_command(prog: str, description: str, commands: dict[str, tuple[str, str]], argv: Sequence[str] | None) -> int:
    """Parse ``argv`` and run the chosen command.

    Exit code 2 and one sentence for bad input or a file that cannot be read or written, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog=prog, description=description)
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in commands.items():
        child = sub.add_parser(name, help=text, description=text)
        if argv and argv[0] == name:
            importlib.import_module(module).add_arguments(child)
    args = parser.parse_args(argv)
    try:
        code = importlib.import_module(commands[args.command][0]).main(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        path = error.filename2 or error.filename or "the disk"
        print(f"error: {path}: {error.strerror}: check path, rights and space.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(run_command("python -m ge2hist_core", __doc__ or "", COMMANDS, None))
