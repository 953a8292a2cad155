"""Recipe: everything that determines a result, and nothing else.

It is the cache key, the URL, the provenance in a report and the input of the command line. ``python -m perturb recipe``
prints one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ge2hist_core.config import SampleConfig, from_json, to_json
from ge2hist_core.files import parse_json
from ge2hist_core.types import BadInput, check_sha256, check_text
from perturb.edits import Edit, EditSet, Perturbation
from perturb.grn import DEFAULT_STEPS, Network, Propagation, read_network

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.types import Cells
    from perturb.signatures import Signature

__all__ = ["DEFAULT_SEEDS", "MAX_PICTURES", "SCHEMA", "Recipe"]

SCHEMA = 1
DEFAULT_SEEDS = tuple(range(16))
DRAFT_STEPS = 50
"""Most steps of a draft: it is drawn while the user waits."""
MAX_PICTURES = 4096
"""Cells times seeds in one arm."""

_SHORT = 12
"""Characters of a SHA-256 that a URL carries: enough to notice other data, 48 bits."""


@dataclass(frozen=True)
class Recipe:
    """What to do with which cells, on which model, with which noise.

    Parameters
    ----------
    data_sha256: of the file that holds the cells.
    model_sha256: of the bundle.
    cell_ids: names of the cells; every cell is drawn with every seed.
    perturbation: edits of the edited arm, one by one or in named sets; empty for none.
    sample: solver, steps and guidance.
    seeds: one picture per cell, arm and seed; both arms share all of the noise of a seed.
    encoder_seed: of tie-breaking and gene subsampling in the encoder, and of the resampling in the statistics.
    propagation: how the edits spread to other genes through a network; None: they do not.
    matrix, gene_column: what to read in the data instead of the automatic choice, as in ``data.open_cells``.
    schema: version of this format.

    Raises
    ------
    BadInput: a field of the wrong form.
    """

    data_sha256: str
    model_sha256: str
    cell_ids: tuple[str, ...]
    perturbation: Perturbation = field(default_factory=Perturbation)
    sample: SampleConfig = field(default_factory=SampleConfig)
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    encoder_seed: int = 0
    propagation: Propagation | None = None
    matrix: str | None = None
    gene_column: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        for name in ("data_sha256", "model_sha256"):
            check_sha256(name, getattr(self, name))
        for name, kind in (("cell_ids", str), ("seeds", int)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or not all(type(part) is kind for part in value):
                raise BadInput(f"{name} is {value!r}: give at least one {'name' if kind is str else 'whole number'}.")
            if kind is str:
                check_text(name, "\n".join(value))
            if len(set(value)) != len(value):
                raise BadInput(f"{name} names {_first_repeated(value)!r} twice: leave one out.")
        for seed in (*self.seeds, self.encoder_seed):
            if type(seed) is not int or not 0 <= seed < 2**63:
                raise BadInput(f"A seed is {seed!r}: choose whole numbers from 0 to 2^63 - 1.")
        if not isinstance(self.propagation, Propagation | None):
            raise BadInput(f"propagation is {self.propagation!r}: give its fields by name or leave it out.")
        for name in ("matrix", "gene_column"):
            if not isinstance(getattr(self, name), str | None) or getattr(self, name) == "":
                raise BadInput(f"{name} is {getattr(self, name)!r}: give a name or leave it out.")
            check_text(name, getattr(self, name) or "")
        # 1 and 1.0 are the same guidance and must hash alike.
        object.__setattr__(self, "sample", replace(self.sample, guidance=float(self.sample.guidance)))
        if len(self.cell_ids) * len(self.seeds) > MAX_PICTURES:
            raise BadInput(
                f"{len(self.cell_ids)} cells with {len(self.seeds)} seeds are more than {MAX_PICTURES} pictures: "
                "choose fewer cells or seeds."
            )

    @property
    def base(self) -> Recipe:
        """The unedited arm: the same recipe without edits."""
        return replace(self, perturbation=Perturbation(), propagation=None)

    @property
    def arms(self) -> dict[str, Recipe]:
        """Recipes of what is drawn: ``base``, ``edited`` and, where edits spread, ``direct`` (they do not) and
        ``control`` (they spread through randomised networks).
        """
        arms = {"base": self.base, "edited": self}
        if self.propagation is not None and self.perturbation:
            arms["direct"] = replace(self, propagation=None)
            arms["control"] = replace(self, propagation=replace(self.propagation, control=True))
        return arms

    @property
    def draft(self) -> Recipe:
        """The same with the first cell and the first seed alone, for a quick look.

        A sampler of more than ``DRAFT_STEPS`` steps is replaced by the default one of the same guidance.
        """
        sample = self.sample
        if sample.steps > DRAFT_STEPS:
            sample = SampleConfig(guidance=sample.guidance)
        return replace(self, cell_ids=self.cell_ids[:1], seeds=self.seeds[:1], sample=sample)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no blanks, so that equal recipes are equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, as in the JSON."""
        value = to_json(self) | {"perturbation": [to_json(part) for part in self.perturbation.parts]}
        if self.propagation is None:
            del value["propagation"]
        return value

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Inverse of :meth:`to_json`; blanks, the order of keys and a report's ``notice`` do not matter.

        Raises
        ------
        BadInput: not JSON, another schema, an unknown, missing or malformed field.
        """
        value = parse_json(text, "The recipe", "give a recipe.json that GE2Hist wrote")
        if not isinstance(value, dict) or "schema" not in value:
            raise BadInput("The recipe has no field 'schema': give a recipe.json that GE2Hist wrote.")
        _check_schema(value["schema"])
        value.pop("notice", None)  # a file says that what comes of it is generated; it decides nothing
        missing = [name for name in ("data_sha256", "model_sha256", "cell_ids") if name not in value]
        if missing:
            raise BadInput(f"The recipe has no field {missing[0]!r}: give a recipe.json that GE2Hist wrote.")
        parts, sample, spread = value.get("perturbation", []), value.get("sample", {}), value.get("propagation")
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in (*parts, sample, spread or {})):
            raise BadInput(
                "The recipe's perturbation, propagation or sample is malformed: give a recipe.json that GE2Hist wrote."
            )
        if spread and spread.get("control"):
            raise BadInput(
                "The recipe's propagation is a control, which is drawn beside another: set control to false."
            )
        try:
            value["perturbation"] = Perturbation(tuple(map(_part, parts)))
            value["sample"] = from_json(SampleConfig, sample)
            value["propagation"] = from_json(Propagation, spread) if spread else None
        except TypeError as error:
            raise BadInput(f"A field of the recipe is missing or of another type ({error}).") from None
        return from_json(cls, value)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from a file.

        Raises
        ------
        BadInput: no such file, or not a recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
            raise BadInput(f"Cannot read the recipe {path}: {error}.") from None
        return cls.from_json(text)

    def to_query(self) -> dict[str, str]:
        """Short form for a URL; what equals its default stays out. Data and model appear as 12 digits of their hash."""
        query = {
            "data": self.data_sha256[:_SHORT],
            "model": self.model_sha256[:_SHORT],
            "cell": ",".join(quote(name, safe=" ") for name in self.cell_ids),
            "edit": str(self.perturbation),
            "seeds": _print_seeds(self.seeds),
            "encoder_seed": str(self.encoder_seed),
            "network": _print_propagation(self.propagation),
            "matrix": self.matrix or "",
            "gene_column": self.gene_column or "",
            "schema": str(self.schema),
        } | {name: _print_number(value) for name, value in to_json(self.sample).items()}
        return {name: value for name, value in query.items() if value != _QUERY_DEFAULTS.get(name)}

    @classmethod
    def from_query(
        cls,
        query: Mapping[str, str],
        data_sha256: str,
        model_sha256: str,
        find_network: Callable[[str], Network] | None = None,
    ) -> Recipe:
        """Inverse of :meth:`to_query`, for the data and the model that are open. Unknown parameters are ignored.

        Parameters
        ----------
        find_network: the network whose SHA-256 begins with the given digits; raises BadInput without one.

        Raises
        ------
        BadInput: a malformed parameter, or a link made for other data, another model or a network that is not here.
        """
        value = _QUERY_DEFAULTS | {key: text for key, text in query.items() if text}
        _check_schema(_number("schema", value["schema"], int))
        for name, title, known in (("data", "cells", data_sha256), ("model", "model", model_sha256)):
            if name in value and not known.startswith(value[name]):
                raise BadInput(f"This link was made with other {title} ({name}={value[name]}): open those first.")
        if "cell" not in value:
            raise BadInput("The link names no cell: add cell=NAME.")
        return cls(
            data_sha256=data_sha256,
            model_sha256=model_sha256,
            cell_ids=tuple(unquote(name) for name in value["cell"].split(",")),
            perturbation=Perturbation.parse(value["edit"]),
            sample=SampleConfig(
                value["solver"],
                _number("steps", value["steps"], int),
                _number("guidance", value["guidance"], float),
            ),
            seeds=_parse_seeds(value["seeds"]),
            encoder_seed=_number("encoder_seed", value["encoder_seed"], int),
            propagation=_parse_propagation(value["network"], find_network) if value["network"] else None,
            matrix=value["matrix"] or None,
            gene_column=value["gene_column"] or None,
        )


def _part(value: dict[str, Any]) -> Edit | EditSet:
    if "edits" not in value:
        return from_json(Edit, value)
    return from_json(EditSet, value | {"edits": [from_json(Edit, edit) for edit in value["edits"]]})


def _check_schema(schema: object) -> None:
    if type(schema) is not int or schema != SCHEMA:
        raise BadInput(
            f"The recipe has schema {schema!r}, this version of GE2Hist reads schema {SCHEMA}: "
            "use the version that wrote it, or make the recipe again."
        )


def _first_repeated(values: tuple[Any, ...]) -> Any:
    return next(value for i, value in enumerate(values) if value in values[:i])


def _print_number(value: object) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise BadInput(f"{name} is {text!r}: give a {'whole ' if kind is int else ''}number.") from None


def _print_seeds(seeds: tuple[int, ...]) -> str:
    """``(0, 1, 2, 7)`` -> ``"0-2,7"``; the order is kept."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _print_propagation(propagation: Propagation | None) -> str:
    """``NETWORK,STEPS,LOW,HIGH,NAME`` with 12 digits of the network's SHA-256."""
    if propagation is None:
        return ""
    numbers = (propagation.steps, *propagation.quantiles)
    name = quote(propagation.network_name, safe=" ")
    return ",".join([propagation.network_sha256[:_SHORT], *map(_print_number, numbers), name])


def _parse_propagation(text: str, find_network: Callable[[str], Network] | None) -> Propagation:
    found = re.fullmatch(r"([0-9a-f]{12})" + ",([^,]+)" * 4, text)
    if found is None:
        raise BadInput(f"network is {text!r}: write 12 digits of its SHA-256, steps, two quantiles and its name.")
    digits, *numbers, name = found.groups()
    steps, low, high = (_number("network", n, kind) for n, kind in zip(numbers, (int, float, float), strict=True))
    if find_network is None:
        raise BadInput(f"This link spreads edits through the network {digits}: open that network first.")
    return Propagation(find_network(digits).sha256, unquote(name), steps, (low, high))


def _parse_seeds(text: str) -> tuple[int, ...]:
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip())
        if match is None:
            raise BadInput(f"seeds is {text!r}: write numbers and ranges such as 0-15,20.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MAX_PICTURES:
            raise BadInput(f"seeds holds the range {part!r}: write at most {MAX_PICTURES} rising seeds.")
        seeds.extend(range(first, last + 1))
    return tuple(seeds)


_QUERY_DEFAULTS = {
    "edit": "",
    "seeds": _print_seeds(DEFAULT_SEEDS),
    "encoder_seed": "0",
    "network": "",
    "matrix": "",
    "gene_column": "",
    "schema": str(SCHEMA),
} | {f.name: _print_number(getattr(SampleConfig(), f.name)) for f in fields(SampleConfig)}


def add_cells(parser: argparse.ArgumentParser) -> None:
    """Options that say which model, which file and which of its cells; see :func:`perturb.run.cells_asked_for`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cell", action="append", metavar="ID", help="cell id; may be given several times")
    which.add_argument("--type", metavar="NAME", help="instead: the file's first cell of this type")
    parser.add_argument(
        "--n-cells", type=int, metavar="N", help="that cell and N - 1 others of its type, as in the app"
    )
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="h5ad or store with raw counts")
    parser.add_argument("--matrix", metavar="NAME", help="X, raw.X or a layer (default: raw counts that are found)")
    parser.add_argument("--gene-column", metavar="NAME", help="column of var, or index (default: best match)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of the sampler and the encoder's seed."""
    sample = SampleConfig()
    parser.add_argument("--solver", default=sample.solver, help="ddpm, ddim or dpm++")
    parser.add_argument("--steps", type=int, default=sample.steps)
    parser.add_argument("--guidance", type=float, default=sample.guidance)
    parser.add_argument("--encoder-seed", type=int, default=0)


def asked_for(args: argparse.Namespace, seeds: tuple[int, ...]) -> tuple[Recipe, GE2Hist, Cells]:
    """Recipe of the options of :func:`add_cells`, :func:`add_sampling` and ``--edit``, its model and its cells.

    Raises
    ------
    BadInput: a bundle, file, cell, gene, edit or option that cannot be used.
    """
    from ge2hist_core.data import open_cells
    from ge2hist_core.model import GE2Hist
    from perturb.run import cells_asked_for, cells_for

    sample, edits = SampleConfig(args.solver, args.steps, args.guidance), Perturbation.parse(args.edit)
    model = GE2Hist.load(args.bundle)
    with open_cells(args.cells, model.scgpt.vocab, matrix=args.matrix, gene_column=args.gene_column) as source:
        recipe = Recipe(
            data_sha256=source.sha256,
            model_sha256=model.sha256,
            cell_ids=cells_asked_for(args, source),
            perturbation=edits,
            sample=sample,
            seeds=seeds,
            encoder_seed=args.encoder_seed,
            matrix=args.matrix,
            gene_column=args.gene_column,
        )
        return recipe, model, cells_for(source, recipe.cell_ids)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb recipe``."""
    from perturb.signature_options import add_reading

    add_cells(parser)
    parser.add_argument("--edit", default="", help="for example CD8A:ko,VEGFA:x0.5,TGFB1:set=3,MYC:p90")
    parser.add_argument(
        "--signature", action="append", metavar="NAME", help="act after --edit; may be given several times"
    )
    parser.add_argument(
        "--dose", type=float, action="append", metavar="D", help="of each signature, or one of all (default: 1)"
    )
    parser.add_argument("--signature-file", help="GMT, CSV, TSV, GCT, GCTX or h5ad (default: the library)")
    add_reading(parser)
    parser.add_argument("--seeds", default=_print_seeds(DEFAULT_SEEDS), help="for example 0-15")
    add_sampling(parser)
    parser.add_argument("--network", help="network table through which the edits spread to other genes")
    parser.add_argument("--network-steps", type=int, default=DEFAULT_STEPS, help="edges in a row, 1 to 10")


def main(args: argparse.Namespace) -> None:
    """Print the recipe of the given options; what became of the signatures' genes goes to standard error.

    Raises
    ------
    BadInput: a bundle, file, cell, gene, edit, signature, network or option that cannot be used.
    """
    from perturb.doses import at_dose
    from perturb.signatures import expand

    network = read_network(args.network) if args.network else None
    signatures = _signatures(args)
    recipe, _, cells = asked_for(args, _parse_seeds(args.seeds))
    for signature, dose in signatures:
        recipe = at_dose(recipe, signature, list(cells.genes), dose)
        for sentence in expand(signature, list(cells.genes), dose).sentences:
            print(f"{signature.name}: {sentence}", file=sys.stderr)
    if network is not None:
        recipe = replace(recipe, propagation=Propagation(network.sha256, network.name, args.network_steps))
    recipe.perturbation.apply(cells.take(slice(len(recipe.cell_ids))), cells)
    print(json.dumps(recipe.to_dict(), indent=1, ensure_ascii=False))


def _signatures(args: argparse.Namespace) -> list[tuple[Signature, float]]:
    """What ``--signature`` and ``--dose`` ask for."""
    from perturb.signature_options import file_signatures, find_signature

    names, doses = args.signature or [], args.dose or [1.0]
    if not names and (args.dose is not None or args.signature_file is not None):
        given = "--dose" if args.dose is not None else "--signature-file"
        raise BadInput(f"{given} is given without --signature: name a signature, or leave it out.")
    if len(set(names)) != len(names):
        raise BadInput(f"--signature names {_first_repeated(tuple(names))!r} twice: give it once.")
    if len(doses) not in (1, len(names) or 1):
        raise BadInput(f"{len(doses)} doses are given for {len(names)} signatures: give one of each, or one of all.")
    read = file_signatures(args)
    return [(find_signature(name, args.signature_file, read), doses[i % len(doses)]) for i, name in enumerate(names)]
