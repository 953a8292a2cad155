"""``python -m perturb COMMAND``: a what-if experiment from the command line, ``--help`` lists the commands."""

from __future__ import annotations

import sys

from ge2hist_core.__main__ import run_command

COMMANDS = {
    "recipe": ("perturb.recipe", "print the recipe of an experiment as JSON"),
    "compare": ("perturb.compare", "run several recipes on the same noise and compare them"),
    "dose": ("perturb.doses", "run a recipe at seven doses of a signature"),
    "evidence": ("perturb.evidence", "run a recipe and say what speaks for and against its effects"),
    "goal": ("perturb.goal", "search edits that move a niche towards a target"),
    "network": ("perturb.networks", "show a network of regulators, fit one, or write the known truth"),
    "screen": ("perturb.screen", "rank many edits of a cell and confirm the leading ones"),
    "known-truth": ("perturb.known_truth", "compare edits with the truth of simulated tissue"),
    "baselines": ("perturb.baselines", "fit trivial baselines into a bundle and measure the model's skill"),
    "types": ("perturb.types_grid", "draw cell types x environments, or the way between two cells"),
    "replay": ("perturb.replay", "run a report's recipe again and compare the numbers"),
    "run": ("perturb.run", "run a recipe and write its report"),
}

if __name__ == "__main__":
    sys.exit(run_command("python -m perturb", __doc__ or "", COMMANDS, None))
