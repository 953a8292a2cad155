"""``python -m ge2hist_core card BUNDLE``: the model card, every figure of which is read from the bundle's own files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ge2hist_core.files import atomic_path
from ge2hist_core.types import BadInput

__all__ = ["add_arguments", "main", "model_card"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")


def main(args: argparse.Namespace) -> None:
    text = model_card(args.bundle)
    with atomic_path(args.bundle / "MODEL_CARD.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(args.bundle / "MODEL_CARD.md")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}): write it again with its command.") from error


def model_card(bundle: Path) -> str:
    """The card of a bundle as Markdown.

    Raises
    ------
    BadInput: the folder is no bundle or one of its JSON files is damaged.
    """
    header = _read(bundle / "bundle.json")
    if not header:
        raise BadInput(f"{bundle} is not a GE2Hist bundle (no bundle.json): give the folder that `train` wrote.")
    training, reader = header.get("training") or {}, _read(bundle / "reader.json")
    evaluation, pretraining = _read(bundle / "evaluation.json"), _read(bundle / "scgpt" / "pretraining.json")
    parts = [_what(training), _made(training, pretraining, reader), _separation(training), _reader(reader)]
    parts += [_evaluation(evaluation), _LIMITS]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(training: Mapping[str, Any]) -> str:
    simulated = training.get("simulation")
    data = (
        "simulated (known-truth) tissue: **a demonstration, not a model of patients**"
        if simulated
        else f"the store `{training.get('data', 'unknown')}`"
    )
    return (
        "# Model card: GE2Hist bundle\n\n"
        "Conditional diffusion model of the H&E niche (64 um) around a cell, given the cell's expression. "
        f"Trained on {data}. "
        "It shows what its training tissue looked like around cells of such expression. It is not diagnostic, and an "
        "edited cell's picture is the model's conditional, not a forecast of an experiment."
    )


def _made(training: Mapping[str, Any], pretraining: Mapping[str, Any], reader: Mapping[str, Any]) -> str:
    simulation, config = training.get("simulation") or {}, training.get("train", {})
    seed = config.get("seed", 0)
    lines = ["## Made by", "", "```"]
    if simulation:
        lines.append(
            f"python -m ge2hist_core simulate --donors {len(simulation['donors'])} --first-donor "
            f"{min(simulation['donors'])} --seed {simulation['seed']} --size-um {simulation['size_um']:g} DATA.zarr"
        )
    if pretraining:
        c = pretraining["config"]
        lines.append(
            f"python -m ge2hist_core pretrain DATA.zarr --out SCGPT --steps {c['steps']} --batch-size "
            f"{c['batch_size']} --seed {c['seed']}"
        )
    lines.append(f"python -m ge2hist_core train DATA.zarr --scgpt SCGPT --out BUNDLE --seed {seed}")
    if reader:
        lines.append("python -m ge2hist_core train-reader DATA.zarr --out BUNDLE")
    lines.append("python -m ge2hist_core evaluate BUNDLE DATA.zarr --out BUNDLE")
    lines += ["python -m ge2hist_core card BUNDLE", "```"]
    cells = training.get("cells", {})
    lines += [
        "",
        f"Main training: {training.get('steps', 0):,} steps of batch {config.get('batch_size', 0)}. Cells: "
        + ", ".join(f"{n:,} {name}" for name, n in cells.items())
        + ". Donors are never shared between them.",
    ]
    return "\n".join(lines)


def _separation(training: Mapping[str, Any]) -> str:
    s = training.get("separation")
    if not s:
        return ""
    rows = [
        "## Separation of type (z_c) and environment (z_e)",
        "",
        "On donors never trained on (`train` writes these into bundle.json).",
        "",
        "| | z_c | z_e |",
        "|---|---|---|",
        f"| balanced accuracy of a linear probe of the type (chance {s['chance']:.2f}) | {s['type_accuracy_z_c']:.3f} "
        f"| {s['type_accuracy_z_e']:.3f} |",
        f"| active units | {s['active_units_z_c']} | {s['active_units_z_e']} |",
    ]
    for name, value in s.get("r2_z_c", {}).items():
        rows.append(f"| R2 of a linear probe of {name.replace('_', ' ')} | {value:.2f} | {s['r2_z_e'][name]:.2f} |")
    rows += [
        "",
        f"Accuracy of the type classifier: {s['classifier_accuracy']:.4f}. Autoencoder: "
        f"{training.get('autoencoder_psnr_db', float('nan')):.1f} dB on held-out tiles.",
    ]
    return "\n".join(rows)


def _reader(reader: Mapping[str, Any]) -> str:
    if not reader:
        return ""
    figures = {k: v for k, v in reader["figures"].items() if isinstance(v, (int, float))}
    rows = ["## Nuclei reader", "", "On held-out donors (`train-reader` writes these into reader.json).", ""]
    rows += ["| figure | value |", "|---|---|"]
    return "\n".join([*rows, *(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in figures.items())])


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    names = {
        "generated_vs_real": "generated, same cells",
        "floor_real_vs_real": "floor: real tiles of other cells of the same types",
        "ceiling_conditions_exchanged": "ceiling: conditions exchanged between cells",
        "reader_vs_truth_on_real": "reader against truth, real tiles",
        **{key: key for key in evaluation.get("steps", {})},
    }
    rows = [
        "## Generated against real tiles",
        "",
        f"Held-out donors, read by the bundle's reader (`evaluate`, {evaluation['sample']['solver']} "
        f"{evaluation['sample']['steps']} steps, seed {evaluation['seed']}). Intervals: 95 % bootstrap over cells. "
        "The last three columns are means of absolute figures over the types of the central cell.",
        "",
        "| compared with the real tile | n | density | composition KL (nats) | nearest neighbour (um) "
        "| by type: density | KL | um |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        c = evaluation.get(key) or evaluation.get("steps", {}).get(key)
        d, kl, um, t = c["density_relative"], c["composition_kl"], c["spacing_um"], c.get("by_type")
        by_type = (
            f"{t['density_relative']:.1%} | {t['composition_kl']:.3f} | {t['spacing_um']:.2f}" if t else "- | - | -"
        )
        rows.append(
            f"| {name} | {c['n']} | {d['value']:+.1%} [{d['low']:+.1%}, {d['high']:+.1%}] | {kl['value']:.4f} "
            f"[{kl['low']:.4f}, {kl['high']:.4f}] | {um['value']:+.2f} [{um['low']:+.2f}, {um['high']:+.2f}] "
            f"| {by_type} |"
        )
    classifier = evaluation["classifier"]
    rows += ["", f"Type classifier: {classifier['accuracy']:.4f} of {classifier['n']:,} cells."]
    effects = evaluation.get("driver_programmes")
    if effects:
        rows += [
            "",
            "## Edits of driver programmes against the truth",
            "",
            f"All drivers of a programme knocked out or multiplied by 4 ({effects['n_cells']} cells). The readout is "
            "the one whose true change is largest against the standard error between tiles. "
            f"Sign right: {effects['signs_right']} of "
            f"{effects['edits_exceeding_noise']} edits whose true change exceeds two standard errors "
            f"({effects['clear_signs_right']} of {effects['clear_readouts']} of all such readouts).",
            "",
            "| programme | direction | readout | true change | model's change |",
            "|---|---|---|---|---|",
        ]
        for e in effects["edits"]:
            unit = " cells/mm2" if e["main_readout"] == "density" else ""
            form = "+.0f" if unit else "+.3f"
            rows.append(
                f"| {e['programme'].replace('_', ' ')} | {e['direction']} | {e['main_readout']} | "
                f"{format(e['true'], form)}{unit} | {format(e['model'], form)}{unit} |"
            )
    return "\n".join(rows)


_LIMITS = """## Limits

- Trained on simulated tissue: it knows the simulator's ten cell types, 677 genes and stains, nothing else. Real cells
  can be put through it; how far outside its experience they lie is said beside every picture.
- The model learned from observation. A reporter gene (an effect of the environment) moves the picture like a cause; in
  the known-truth tissue its true effect is none.
- CD4 T, CD8 T and B cells look alike in H&E; the reader counts them together.
- Intervals over seeds describe the model's own spread, not biological replication."""
