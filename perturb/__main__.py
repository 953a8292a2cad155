"""``python -m perturb recipe | run | dose | network | screen | replay``: a what-if experiment from the command line."""

from __future__ import annotations

import sys

from ge2hist_core.__main__ import run_command

COMMANDS = {
    "recipe": ("perturb.recipe", "print the recipe of an experiment as JSON"),
    "dose": ("perturb.doses", "run a recipe at seven doses of a signature"),
    "network": ("perturb.networks", "show a network of regulators, fit one, or write the known truth"),
    "screen": ("perturb.screen", "rank many edits of a cell and confirm the leading ones"),
    "replay": ("perturb.replay", "run a report's recipe again and compare the numbers"),
    "run": ("perturb.run", "run a recipe and write its report"),
}

if __name__ == "__main__":
    sys.exit(run_command("python -m perturb", __doc__ or "", COMMANDS, None))
