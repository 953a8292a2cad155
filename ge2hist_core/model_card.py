"""``python -m ge2hist_core card BUNDLE``: the model card, every figure of which is read from the bundle's own files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ge2hist_core.config import PRESETS, TrainConfig, to_json
from ge2hist_core.evaluation.report import section_markdown, sections
from ge2hist_core.files import atomic_path, parse_json
from ge2hist_core.types import BadInput

__all__ = ["add_arguments", "main", "model_card"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.model import GE2Hist

    text = model_card(args.bundle)
    evaluation = _read(args.bundle / "evaluation.json")
    if evaluation and evaluation.get("bundle_sha256") != GE2Hist.load(args.bundle).sha256:
        raise BadInput(
            f"{args.bundle / 'evaluation.json'} holds figures of other weights than the bundle has now: "
            "run `evaluate` again."
        )
    with atomic_path(args.bundle / "MODEL_CARD.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(args.bundle / "MODEL_CARD.md")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return parse_json(path.read_bytes(), str(path), "write it again with its command")


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
    known = _read(bundle / "known_truth.json")
    parts = [_what(header), _made(header, pretraining, reader, _fitted(bundle), evaluation, known)]
    parts += [_separation(training), _reader(reader), _evaluation(evaluation), _known_truth(known)]
    parts += [*_contest(evaluation), _limits(training), _notes(bundle)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(bundle: Path) -> str:
    """What whoever made the bundle has to add: ``NOTES.md`` in its folder."""
    path = bundle / "NOTES.md"
    return "## Notes\n\n" + path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _what(header: Mapping[str, Any]) -> str:
    training, config = header.get("training") or {}, header["config"]
    simulated = training.get("simulation")
    data = (
        "simulated (known-truth) tissue: **a demonstration, not a model of patients**"
        if simulated
        else f"the store `{training.get('data', 'unknown')}`"
    )
    return (
        "# Model card: GE2Hist bundle\n\n"
        f"Conditional diffusion model of the H&E niche ({config['tile_px'] * config['um_per_px']:g} um) around a cell, "
        "given the cell's expression. "
        f"Trained on {data}. "
        "It shows what its training tissue looked like around cells of such expression. It is not diagnostic, and an "
        "edited cell's picture is the model's conditional, not a forecast of an experiment."
    )


def _fitted(bundle: Path) -> list[str]:
    """Commands whose results lie in the bundle."""
    files = {
        "gates.json": "ge2hist_core gates",
        "baselines/baselines.json": "perturb baselines",
        "real_tiles/tiles.json": "ge2hist_core real-tiles",
    }
    return [f"python -m {command} BUNDLE DATA.zarr" for name, command in files.items() if (bundle / name).is_file()]


def _made(
    header: Mapping[str, Any],
    pretraining: Mapping[str, Any],
    reader: Mapping[str, Any],
    fitted: Sequence[str],
    evaluation: Mapping[str, Any],
    known: Mapping[str, Any],
) -> str:
    training = header.get("training") or {}
    simulation = training.get("simulation") or {}
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
            f"{c['batch_size']} --precision {c['precision']} --seed {c['seed']}"
        )
    runs = _runs(training)
    for i, run in enumerate(runs):
        lines.append(_train_command(header, run, i, len(runs)))
    if reader:
        c = reader["figures"].get("train")
        lines.append(
            "python -m ge2hist_core train-reader DATA.zarr --out BUNDLE"
            + (f" --steps {c['steps']} --batch-size {c['batch_size']} --seed {c['seed']}" if c else "")
            + (" --autoencoder BUNDLE" if "reconstructed" in reader["figures"] else "")
        )
    decoders = _decoders(training)
    for decoder in decoders:
        c = decoder["train"]
        lines.append(
            f"python -m ge2hist_core train-decoder BUNDLE DATA.zarr --steps {decoder['steps']} --batch-size "
            f"{c['autoencoder_batch']} --learning-rate {c['autoencoder_learning_rate']:g} --adversarial "
            f"{c['adversarial']:g} --mixed-precision {c['mixed_precision']} --seed {c['seed']}"
        )
    lines += fitted
    if evaluation:
        sample, steps = evaluation["sample"], [*evaluation.get("steps", {}).values()]
        lines.append(
            f"python -m ge2hist_core evaluate BUNDLE DATA.zarr --out BUNDLE --tiles "
            f"{evaluation['generated_vs_real']['n']} --reference-tiles {steps[0]['n'] if steps else 0} --edit-cells "
            f"{evaluation.get('driver_programmes', {}).get('n_cells', 0)} --steps {sample['steps']} --guidance "
            f"{sample['guidance']:g} --seed {evaluation['seed']}" + _counts(evaluation) + _rivals(evaluation)
        )
    if niche := known.get("niche network"):
        lines.append(
            f"python -m perturb known-truth BUNDLE DATA.zarr --out BUNDLE --cells {niche['n_cells']} --per-role "
            f"{niche['n_cases']['driver'] // 2} --seed {known['seed']}"
            + (f" --pictures {known['pictures']['cells']}" if "cells" in (known.get("pictures") or {}) else "")
        )
    if simulation:
        lines.append("python -m ge2hist_core demo-cells DATA.zarr --bundle BUNDLE --out CELLS.h5ad")
    lines += ["python -m ge2hist_core card BUNDLE", "```"]
    cells = training.get("cells", {})
    encoder_runs = [run["train"] for run in runs if not run["train"].get("freeze_encoder")]
    terms = encoder_runs[-1] if encoder_runs else {}
    lines += [
        "",
        *(
            f"`CONFIG{i + 1}.json`: `{json.dumps({'train': changed})}`.\n"
            for i, run in enumerate(runs)
            if (changed := _changed(run["train"], PRESETS[_preset(header)].train))
        ),
        "Main training: "
        + ", then ".join(_taken(run) for run in runs)
        + ("; the decoder: " + ", then ".join(_taken(run) for run in decoders) if decoders else "")
        + ". Cells: "
        + ", ".join(f"{n:,} {name}" for name, n in cells.items())
        + ". Donors are never shared between them.",
        "",
        "Beside the three terms of the paper's equation (9) the loss has four that keep type and environment apart "
        f"(`ge2hist_core/vae.py`), weighted: type prior {terms.get('type_prior', 0):g}, "
        f"type leak {terms.get('type_leak', 0):g}, "
        f"reconstruction {terms.get('reconstruction', 0):g} and neighbours {terms.get('neighbours', 0):g}. Diffusion "
        "runs on latents of a small autoencoder: on a CPU pixels folded into channels were still noise after as many "
        "steps as gave nuclei on latents.",
    ]
    return "\n".join(lines)


def _counts(evaluation: Mapping[str, Any]) -> str:
    """Options of the numbers that an evaluation before this version did not have."""
    names = ("type_pictures", "training_cells", "classified_cells")
    counts = evaluation.get("counts") or {}
    return "".join(f" --{name.replace('_', '-')} {counts[name]}" for name in names if counts.get(name) is not None)


def _rivals(evaluation: Mapping[str, Any]) -> str:
    names = [name for name, m in (evaluation.get("methods") or {}).items() if m["kind"] == "rival"]
    return " --rivals " + " ".join(name.upper().replace(":", "_") for name in names) if names else ""


def _runs(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of `train` behind a bundle, the first one first."""
    runs: list[Mapping[str, Any]] = []
    now: Mapping[str, Any] | None = training if training.get("train") else None
    while now:
        runs.insert(0, now)
        now = (now.get("started_from") or {}).get("training")
    return runs


def _decoders(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of `train-decoder` on a bundle, the first one first."""
    runs: list[Mapping[str, Any]] = []
    now = training.get("decoder")
    while now:
        runs.insert(0, now)
        now = now.get("started_from")
    return runs


def _train_command(header: Mapping[str, Any], run: Mapping[str, Any], i: int, n: int) -> str:
    config, preset = run["train"], _preset(header)
    out = "BUNDLE" if i == n - 1 else f"RUN{i + 1}"
    return (
        f"python -m ge2hist_core train DATA.zarr --scgpt SCGPT --out {out} --preset {preset} --steps {config['steps']} "
        f"--mixed-precision {config['mixed_precision']} --seed {config['seed']}"
        + (f" --start-from RUN{i}" if i else "")
        + (" --freeze-encoder" if config.get("freeze_encoder") else "")
        + (f" --config CONFIG{i + 1}.json" if _changed(config, PRESETS[preset].train) else "")
    )


def _preset(header: Mapping[str, Any]) -> str:
    shape = (header["config"]["unet_channels"], header["config"].get("tile_px", 128))
    return next((name for name, p in PRESETS.items() if ([*p.model.unet_channels], p.model.tile_px) == shape), "demo")


_OPTIONS = ("steps", "mixed_precision", "seed", "freeze_encoder", "accumulation", "workers", "checkpoint_every")
"""Fields of a training configuration that options set, or that do not decide the result."""


def _changed(config: Mapping[str, Any], usual: TrainConfig) -> dict[str, Any]:
    """Fields of ``--config`` with which a run differed from its preset; fields that it did not know it did not set."""
    preset = to_json(usual)
    return {k: v for k, v in config.items() if k not in _OPTIONS and k in preset and v != preset[k]}


def _taken(run: Mapping[str, Any]) -> str:
    """Steps, batch, time and device of a run of `train` or `train-decoder`."""
    train, seconds = run["train"], run.get("seconds")
    batch = train.get("batch_size") or train["autoencoder_batch"]
    where = "" if run.get("device") in (None, "cpu") else f" on one {run['device']}"
    took = f", {_duration(seconds)}{where}" if seconds else where
    return f"{run['steps']:,} steps of batch {batch}{took}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


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
    for name, value in figures.items():
        rows.append(f"| {name.replace('_', ' ')} | {format(value, ',' if isinstance(value, int) else '.4g')} |")
    return "\n".join(rows)


def _number(value: float | None, form: str) -> str:
    """``value`` in the format ``form``, a dash for a figure without an answer."""
    return "-" if value is None else format(value, form)


def _interval(figure: Mapping[str, float | None], form: str) -> str:
    value, low, high = (_number(figure[key], form) for key in ("value", "low", "high"))
    return value if figure["low"] is None else f"{value} [{low}, {high}]"


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
        f"{evaluation['sample']['steps']} steps, seed {evaluation['seed']}). Intervals: 95 %, bootstrap over donors "
        "and their cells. "
        "The last three columns are means of absolute figures over the types of the central cell.",
        "",
        "| compared with the real tile | n | density | composition KL (nats) | nearest neighbour (um) "
        "| by type: density | KL | um |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        c = evaluation.get(key) or evaluation.get("steps", {}).get(key)
        by_type = c.get("by_type", {})
        cells = [name, str(c["n"])]
        for figure, form in (("density_relative", "+.1%"), ("composition_kl", ".4f"), ("spacing_um", "+.2f")):
            cells.append(_interval(c[figure], form))
        for figure, form in (("density_relative", ".1%"), ("composition_kl", ".3f"), ("spacing_um", ".2f")):
            cells.append(_number(by_type.get(figure), form))
        rows.append(f"| {' | '.join(cells)} |")
    rows.append(f"| target | {_TARGETS} |")
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
                f"{_number(e['true'], form)}{unit} | {_number(e['model'], form)}{unit} |"
            )
    return "\n".join(rows)


_CONTEST = ("verdicts", "table_1", "figure_3", "separation", "central_types", "read_back")


def _known_truth(known: Mapping[str, Any]) -> str:
    """What ``known-truth`` measured with the niche network; empty without it."""
    niche = known.get("niche network")
    if not niche:
        return ""

    def interval(figure: Mapping[str, Any], form: str = ".2f", factor: float = 1.0) -> str:
        if figure["value"] is None:
            return "-"
        if figure["low"] is None or figure["high"] is None:
            return format(figure["value"] * factor, form)
        value, low, high = (format(figure[name] * factor, form) for name in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    lines = [
        "## Edits of known effect",
        "",
        f"{niche['n_cells']} cells of {niche['n_donors']} held-out donors (`known-truth`). Slope of the niche "
        "network's effect on the true one, driver programmes at five doses, made directly or spread through a network.",
        "",
        "| way of editing | slope, density | slope, shares | right direction of clear effects |",
        "|---|---|---|---|",
    ]
    for arm, slope in niche["slopes"].items():
        sign = niche["signs"][arm]
        both = f"{interval(slope['density'])} | {interval(slope['shares'])}"
        lines.append(f"| {arm} | {both} | {sign['right']} of {sign['of']} |")
    follows = niche["beyond_inert"]["direct"]["reporter"]
    lines += [
        "",
        "Genes that only follow a programme drive nothing; edited directly, they exceed 95 % of the effects of "
        f"unlinked genes in {interval(follows, '.0f', 100.0)} % of {follows['of']} readouts (5 % is chance). "
        "Intervals: 95 %, over donors of the same tissue.",
    ]
    return "\n".join([*lines, *_drawn_truth(known.get("pictures") or {}, interval)])


def _drawn_truth(drawn: Mapping[str, Any], interval: Callable[[Mapping[str, Any], str, float], str]) -> list[str]:
    """Type-I error and coverage of what the app says of pictures."""
    lines = []
    for row in drawn.get("tests", ()):
        if row["role"] == "inert" and row["readout"] == "all":
            lines.append(
                f"In pictures of {drawn['seeds']} noise seeds p is below 0.05 in {interval(row['p'], '.0f', 100.0)} % "
                f"of {row['p']['of']} tests of genes that move nothing."
            )
    for row in drawn.get("own_conditional", ()):
        if row["what"] == "all":
            lines.append(
                f"95 % intervals from {row['seeds']} seeds held the mean of {drawn['further']} further seeds in "
                f"{interval(row, '.0f', 100.0)} % of {row['of']} cases; {row.get('without', 0)} more had none, as none "
                "of their pictures changed."
            )
    return ["", " ".join(lines)] if lines else []


def _contest(evaluation: Mapping[str, Any]) -> list[str]:
    """The paper's tables with its competitors, as ``evaluate`` tells them."""
    return [section_markdown(section) for section in sections(evaluation) if section.key in _CONTEST]


def _limits(training: Mapping[str, Any]) -> str:
    return _LIMITS.format(_SIMULATED if training.get("simulation") else _MEASURED)


_TARGETS = "500 | within 5% | at most 0.0500 | within 0.50 | | | "

_SIMULATED = """Trained on simulated tissue: it knows the simulator's ten cell types, 677 genes and stains, nothing
  else. Real cells can be put through it; how far outside its experience they lie is said beside every picture."""

_MEASURED = """It knows the cell types, genes and stains of its training tissue, nothing else. How far outside its
  experience other cells lie is said beside every picture."""

_LIMITS = """## Limits

- {}
- The model learned from observation. A reporter gene (an effect of the environment) moves the picture like a cause; in
  the known-truth tissue its true effect is none.
- CD4 T, CD8 T and B cells look alike in H&E; the reader counts them together.
- Intervals over seeds describe the model's own spread, not biological replication."""
