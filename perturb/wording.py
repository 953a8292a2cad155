"""Words of the reports: the question, the method as a paper would print it, references, licences, cautions.

Everything here is plain text. Whoever shows it escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ge2hist_core.types import Cells
from perturb.edits import Edit, EditSet, Perturbation
from perturb.recipe import Recipe
from perturb.stats import EXACT_UP_TO, FEW, N_BOOTSTRAP, N_FLIPS
from perturb.tables import LEVEL

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.evidence import Evidence
    from perturb.result import Result
    from perturb.screen import Screen, ScreenResult

__all__ = [
    "CAUTIONS",
    "NOTICE",
    "Origin",
    "design",
    "doses_facts",
    "doses_method",
    "doses_question",
    "facts",
    "label",
    "licences",
    "method",
    "question",
    "references",
    "scenarios_facts",
    "scenarios_method",
    "scenarios_question",
    "screen_facts",
    "screen_method",
    "screen_question",
    "seeds_in_words",
    "smallest_p",
]

NOTICE = "Generated, not diagnostic"
CAUTIONS = (
    "These pictures are generated. They are no tissue, no diagnosis and no evidence that an experiment would turn out "
    "alike.",
    "A difference says how this model's picture depends on the gene's count, which mixes cause and correlation in its "
    "training data.",
    "The encoder ranks counts within a cell: an edit that changes no rank changes nothing, and one that moves many "
    "ranks may act through them.",
    "The reader miscounts and mistypes some nuclei, in both arms; its measured errors are in the model card.",
)

SOLVERS = {"ddpm": "ancestral DDPM sampling", "ddim": "DDIM", "dpm++": "DPM-Solver++"}
REFERENCES = {
    "GE2Hist": "Cai et al. 2025, Generating Histology Images from Single-cell Gene Expression via Cross-modal "
    "Generative Network, MICCAI 2025",
    "scGPT": "Cui et al. 2024, doi:10.1038/s41592-024-02201-0",
    "ddpm": "Ho et al. 2020, arXiv:2006.11239",
    "ddim": "Song et al. 2021, arXiv:2010.02502",
    "dpm++": "Lu et al. 2022, arXiv:2211.01095",
    "bootstrap": "Hesterberg 2015, doi:10.1080/00031305.2015.1089789",
    "crossed": "Satterthwaite 1946, doi:10.2307/3002019",
    "allowance": "Agresti and Coull 1998, doi:10.1080/00031305.1998.10480550",
    "p": "Phipson and Smyth 2010, doi:10.2202/1544-6115.1585",
    "q": "Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x",
    "filter": "Bourgon et al. 2010, doi:10.1073/pnas.0914005107",
}

ALLOWANCE = (
    "Intervals allow for further pairs to differ by half of what one nucleus makes of a readout (two added values, as "
    "in Agresti and Coull 1998)."
)

SOURCES = Path(__file__).parents[1] / "assets" / "SOURCES.md"
LIBRARIES = {
    "PyTorch": "BSD-3-Clause",
    "diffusers": "Apache-2.0",
    "NumPy, SciPy, pandas": "BSD-3-Clause",
    "plotly.js (inside the HTML page)": "MIT",
}


@dataclass(frozen=True)
class Origin:
    """What the numbers of a report were made with.

    Parameters
    ----------
    source: name of the data file.
    engine: fingerprint of this project's code.
    versions: of Python and libraries.
    sizes: numbers in the embedding, z_c and z_e.
    tile_px, um_per_px: of the pictures.
    model_card: text of the bundle's MODEL_CARD.md, empty if it has none.
    network: where the network through which edits spread comes from, empty without one.
    """

    source: str
    scgpt_sha256: str
    engine: str
    versions: dict[str, str]
    sizes: tuple[int, int, int]
    tile_px: int
    um_per_px: float
    model_card: str
    network: str = ""

    @classmethod
    def of_result(cls, result: Result) -> Origin:
        """Of a comparison, which brings its own provenance."""
        arm, known = result.base_arm, result.provenance
        return cls(
            source=known["source"],
            scgpt_sha256=known["scgpt_sha256"],
            engine=known["engine"],
            versions=known["versions"],
            sizes=(arm.embedding.shape[1], arm.latent.z_c.shape[1], arm.latent.z_e.shape[1]),
            tile_px=arm.images.shape[1],
            um_per_px=result.um_per_px,
            model_card=result.model_card,
            network=known.get("network", {}).get("source", ""),
        )

    @classmethod
    def of_model(cls, model: GE2Hist, cells: Cells) -> Origin:
        """Of what is computed here and now."""
        from perturb.cache import engine_fingerprint, versions

        config, path = model.config, None if model.folder is None else model.folder / "MODEL_CARD.md"
        return cls(
            source=cells.source,
            scgpt_sha256=model.scgpt.sha256,
            engine=engine_fingerprint(),
            versions=versions(),
            sizes=(config.embedding_dim, config.d_c, config.d_e),
            tile_px=config.tile_px,
            um_per_px=config.um_per_px,
            model_card=path.read_text(encoding="utf-8") if path is not None and path.exists() else "",
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """As a report's ``provenance.json`` holds it."""
        return {name: getattr(self, name) for name in ("source", "scgpt_sha256", "engine", "versions")}

    def facts(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Versions, hashes, sampler and encoder seed: two columns."""
        sample, how = recipe.sample, recipe.propagation
        rows = [
            ("data", self.source),
            ("data SHA-256", recipe.data_sha256),
            ("read from", ", ".join(filter(None, (recipe.matrix, recipe.gene_column)))),
            ("network", "" if how is None else f"{how.network_name} ({self.network})"),
            ("network SHA-256", "" if how is None else how.network_sha256),
            ("model bundle SHA-256", recipe.model_sha256),
            ("scGPT weights SHA-256", self.scgpt_sha256),
            ("sampler", f"{sample.solver}, {sample.steps} steps, guidance {sample.guidance:g}"),
            ("encoder seed, also of the resampling", str(recipe.encoder_seed)),
            ("code fingerprint", self.engine),
            *self.versions.items(),
        ]
        return [(name, value) for name, value in rows if value]


def facts(recipe: Recipe, origin: Origin) -> list[tuple[str, str]]:
    """Versions, hashes and seeds of a comparison."""
    return [("recipe SHA-256", recipe.hash), ("noise seeds", seeds_in_words(recipe.seeds)), *origin.facts(recipe)]


def screen_facts(screen: Screen, origin: Origin) -> list[tuple[str, str]]:
    """Versions, hashes and seeds of a screen."""
    return [
        ("screen SHA-256", screen.hash),
        ("noise seeds that chose", seeds_in_words(screen.first_seeds)),
        ("further noise seeds", seeds_in_words(screen.further_seeds)),
        *origin.facts(screen.recipe),
    ]


def scenarios_facts(names: Sequence[str], results: Sequence[Result]) -> list[tuple[str, str]]:
    """Versions, hashes and seeds of scenarios on the same noise."""
    rows = [(f"recipe SHA-256 of {name}", one.recipe.hash) for name, one in zip(names, results, strict=True)]
    rows.append(("noise seeds", seeds_in_words(results[0].recipe.seeds)))
    # What scenarios share stands once.
    facts = {fact: "" for result in results for fact in Origin.of_result(result).facts(result.recipe)}
    return [*rows, *facts]


def doses_facts(series: Sequence[tuple[float, Recipe]], origin: Origin) -> list[tuple[str, str]]:
    """Versions, hashes and seeds of a series of doses."""
    last = series[-1][1]
    rows = [(f"recipe SHA-256 at dose {dose:g}", recipe.hash) for dose, recipe in series]
    return [*rows, ("noise seeds", seeds_in_words(last.seeds)), *origin.facts(last)]


def label(perturbation: Perturbation) -> str:
    """A perturbation in a few words, for tables and charts.

    Examples
    --------
    >>> label(Perturbation.parse("CD8A:ko")), label(Perturbation.parse("IFN@1.5(STAT1:x2;MYC:x0.5)"))
    ('CD8A knocked out', 'IFN at dose 1.5 (2 genes)')
    """
    return ", ".join(map(_few_words, perturbation.parts)) or "no edit"


def _few_words(part: Edit | EditSet) -> str:
    if isinstance(part, EditSet):
        dose = "" if part.dose is None else f" at dose {part.dose:g}"
        return f"{part.name}{dose} ({_count(len(part.edits), 'gene')})"
    what = {"ko": "knocked out", "factor": f"at {100 * part.amount:g} % of its counts"}
    what |= {"percentile": f"at percentile {part.amount:g} of the cell's type", "set": f"at {part.amount:g} counts"}
    return f"{part.gene} {what[part.kind]}"


def _sentence(part: Edit | EditSet) -> str:
    if isinstance(part, EditSet):
        dose = "" if part.dose is None else f" at dose {part.dose:g}"
        return f"{part.name}{dose} acts on {_count(len(part.edits), 'gene')}"
    what = {"ko": "knocked out", "factor": f"set to {100 * part.amount:g} % of its counts"}
    what |= {"percentile": f"set to percentile {part.amount:g} of the cell's type"}
    what |= {"set": f"set to {part.amount:g} counts"}
    return f"{part.gene} is {what[part.kind]}"


def _edits(perturbation: Perturbation) -> str:
    return ", then ".join(map(_sentence, perturbation.parts))


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _cells(cell_ids: Sequence[str]) -> str:
    return f"cell {cell_ids[0]}" if len(cell_ids) == 1 else f"{len(cell_ids)} cells"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` -> ``"0, 1, 2, 5"``; ``"0 to 15"`` for a run of numbers.

    Examples
    --------
    >>> seeds_in_words((0, 1, 2, 3)), seeds_in_words((0, 5))
    ('0 to 3', '0, 5')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def question(recipe: Recipe) -> str:
    """What a comparison asks."""
    what = "when " + _edits(recipe.perturbation) if recipe.perturbation else "when nothing is edited"
    if recipe.propagation is not None and recipe.perturbation:
        what += f" and the edit spreads through the network {recipe.propagation.network_name}"
    return f"How does the model draw the niche of {_cells(recipe.cell_ids)} {what}?"


def screen_question(screen: Screen) -> str:
    """What a screen asks."""
    moved = {"shift": "most", "density": "in density most"}.get(
        screen.readout, f"in its share of {screen.readout.partition(':')[2]} most"
    )
    own = screen.recipe.perturbation
    after = f", after {label(own)}" if own else ""
    of = _cells(screen.recipe.cell_ids)
    n = len(screen.candidates)
    return f"Which of {_count(n, _kind(screen))} move{'s' * (n == 1)} the niche of {of} {moved}{after}?"


def scenarios_question(recipes: Sequence[Recipe]) -> str:
    """What a comparison of scenarios asks."""
    n = len(recipes)
    cells = {recipe.cell_ids for recipe in recipes}
    of = _cells(recipes[0].cell_ids) if len(cells) == 1 else "several cells"
    return f"How does the model draw the niche of {of} in {_count(n, 'scenario')} on the same noise?"


def doses_question(series: Sequence[tuple[float, Recipe]], name: str) -> str:
    """What a series of doses asks."""
    first, last = series[0][0], series[-1][0]
    of = _cells(series[0][1].cell_ids)
    return f"How does the model draw the niche of {of} at {len(series)} doses of {name}, from {first:g} to {last:g}?"


def _kind(screen: Screen) -> str:
    parts = [part for candidate in screen.candidates for part in candidate.parts]
    if all(isinstance(part, Edit) and part.kind == "ko" for part in parts):
        return "knock-out"
    return "signature" if all(isinstance(part, EditSet) and part.dose is not None for part in parts) else "edit"


def smallest_p(n_cells: int, n_seeds: int) -> float:
    """Smallest p that a design can give, see :func:`perturb.stats.crossed_effect`.

    By sign flips, over the seeds of one cell or the cells of one seed: the observed signs and their reverse count among
    all. 0, so none, over several cells and seeds.

    Examples
    --------
    >>> smallest_p(1, 5), smallest_p(6, 1), smallest_p(1, 100), smallest_p(8, 4)
    (0.0625, 0.03125, 0.0001, 0.0)
    """
    if min(n_cells, n_seeds) > 1:
        return 0.0
    n = max(n_cells, n_seeds)
    return min(1.0, 2.0 ** (1 - n)) if n <= EXACT_UP_TO else 1 / (N_FLIPS + 1)


def design(n_cells: int, n_seeds: int) -> dict[str, Any]:
    """What the pages' template needs to say what an interval over so many cells and seeds covers."""
    few = "" if min(n_cells, n_seeds) > FEW else "cells" if n_cells <= n_seeds else "seeds"
    smallest = f"{smallest_p(n_cells, n_seeds):.2g}"
    return {"n_cells": n_cells, "n_seeds": n_seeds, "few": few, "smallest_p": smallest}


def _statistics(n_cells: int, n_seeds: int, adjusted: str) -> str:
    """Interval, p and q of paired effects as a method section describes them; ``adjusted`` is empty without a q."""
    if min(n_cells, n_seeds) > 1:
        return (
            f"Effects are mean paired differences (edited - unedited) with {100 * LEVEL:g} % intervals over {n_cells} "
            f"cells and {n_seeds} noise seeds as two crossed random factors (mean squares; Student's quantiles, "
            f"degrees of freedom of Satterthwaite 1946). {ALLOWANCE} P-values are two-sided and of that test, under "
            f"the null hypothesis that the mean difference over cells and seeds is zero{_q(adjusted)}."
        )
    unit, n = ("cell", n_cells) if n_cells > 1 else ("noise seed", n_seeds)
    flips = f"all {2**n:,} sign patterns" if n <= EXACT_UP_TO else f"{N_FLIPS:,} random sign patterns"
    return (
        f"Effects are mean paired differences (edited - unedited) with {100 * LEVEL:g} % bootstrap intervals over "
        f"{unit}s ({N_BOOTSTRAP:,} resamples, percentile levels expanded for small samples; Hesterberg 2015). "
        f"{ALLOWANCE} P-values are two-sided sign-flip p-values under the null hypothesis that the paired differences, "
        f"one per {unit} (n = {n}), are symmetric about zero ({flips}; the smallest possible p is "
        f"{smallest_p(n_cells, n_seeds):.2g}; Phipson and Smyth 2010){_q(adjusted)}."
    )


def matched_in_words(n: int) -> str:
    """What p matched is in a screen of ``n`` candidates."""
    from perturb.screen import MATCHED, STAND_INS

    if n <= MATCHED:
        return (
            f"p matched = (b + 1) / (n + 1) with b of at most n = {STAND_INS} random edits that move at least as far: "
            "the candidate's own edits, made to other genes of like expression. It is a guess without drawing."
        )
    return (
        "p matched = (b + 1) / (n + 1) with b of the n other candidates that move at least as far once the trend with "
        f"mean count (median of the log change through groups of at least {MATCHED} candidates) is taken out. It is a "
        "rank among these candidates, not a test."
    )


def _q(adjusted: str) -> str:
    if not adjusted:
        return "; they are not adjusted"
    return f"; q-values adjust them over {adjusted} (Benjamini and Hochberg 1995)"


def method(result: Result, evidence: Evidence | None = None) -> str:
    """The comparison, and the evidence on it, as a paper's method section would describe it."""
    recipe, origin = result.recipe, Origin.of_result(result)
    n_cells, n_seeds = len(recipe.cell_ids), len(recipe.seeds)
    edits = f"an edit in silico ({label(recipe.perturbation)})" if recipe.perturbation else "no edit"
    spread = ""
    if recipe.propagation is not None and recipe.perturbation:
        how = recipe.propagation
        spread = (
            f" The edit was spread to other genes through the signed network {how.network_name} (SHA-256 "
            f"{how.network_sha256}; {_count(how.steps, 'step')}, results clipped to quantiles {how.quantiles[0]:g} to "
            f"{how.quantiles[1]:g} of the cells at hand). The same was drawn without spreading and with networks of "
            "randomised wiring, another one for each noise seed, as controls."
        )
    tested = int(result.comparison["p"].notna().sum())
    further = ""
    if evidence is not None:
        from perturb.evidence_words import method as of_evidence

        further = of_evidence(evidence)
    return (
        f"Raw counts of {_cells(recipe.cell_ids)} ({origin.source}, SHA-256 {recipe.data_sha256}) were used as they "
        f"are and after {edits}.{spread} {_drawing(recipe, origin)} Each cell was drawn with "
        f"{_count(n_seeds, 'noise seed')} ({seeds_in_words(recipe.seeds)}); the arms shared all noise of a seed, so "
        f"that the pictures of a pair differ by the edit alone. {_reading()} "
        f"{_statistics(n_cells, n_seeds, _count(tested, 'readout'))} {further + ' ' * bool(further)}"
        f"{_made_with(recipe, origin)} Recipe SHA-256 {recipe.hash}. All pictures are generated; intervals "
        "and p-values speak of this model's answer, not of donors or repeated experiments."
    )


def scenarios_method(names: Sequence[str], results: Sequence[Result], reference: str) -> str:
    """A comparison of scenarios as a paper's method section would describe it."""
    recipe, origin = results[0].recipe, Origin.of_result(results[0])
    n_seeds = len(recipe.seeds)
    what = "; ".join(
        f"{name}: {_cells(one.recipe.cell_ids)}, {label(one.recipe.perturbation)}{_through(one.recipe)}"
        for name, one in zip(names, results, strict=True)
    )
    statistics = " ".join(
        _statistics(n_cells, n_seeds, "the readouts of each scenario")
        for n_cells in dict.fromkeys(len(one.recipe.cell_ids) for one in results)
    )
    contrasts = (
        f"Contrasts are paired differences of the edited pictures of each scenario to those of {reference}: picture by "
        "picture where both have the same cells, with the statistics of the effects; else of the means over the cells "
        "of each seed, with intervals over seeds alone. "
        if len(results) > 1
        else ""
    )
    return (
        f"{_count(len(results), 'scenario')} ({what}) were drawn from raw counts ({origin.source}, SHA-256 "
        f"{recipe.data_sha256}). {_drawing(recipe, origin)} Each cell was drawn without and with the scenario's edits "
        f"with {_count(n_seeds, 'noise seed')} ({seeds_in_words(recipe.seeds)}); all arms of all scenarios shared all "
        f"noise of a seed. {_reading()} {statistics} {contrasts}{_made_with(recipe, origin)} All pictures are "
        "generated; intervals and p-values speak of this model's answer, not of donors or repeated experiments."
    )


def doses_method(series: Sequence[tuple[float, Recipe]], name: str, unit: str, origin: Origin) -> str:
    """A series of doses as a paper's method section would describe it."""
    recipe = series[-1][1]
    n_cells, n_seeds = len(recipe.cell_ids), len(recipe.seeds)
    listed = ", ".join(f"{dose:g}" for dose, _ in series)
    return (
        f"The signature {name} was applied to the raw counts of {_cells(recipe.cell_ids)} ({origin.source}, SHA-256 "
        f"{recipe.data_sha256}) at doses {listed} ({unit}), at the largest as {label(recipe.perturbation)}"
        f"{_through(recipe)}; at dose 0 it was left out. {_drawing(recipe, origin)} Each dose was drawn with "
        f"{_count(n_seeds, 'noise seed')} ({seeds_in_words(recipe.seeds)}) and compared with the same unedited "
        f"pictures; all doses shared all noise of a seed. {_reading()} "
        f"{_statistics(n_cells, n_seeds, '')} Where effects follow a sigmoid, a Hill curve was fitted to them, and its "
        f"half-effective dose is stated with its interval. {_made_with(recipe, origin)} All pictures are generated; "
        "intervals and p-values speak of this model's answer, not of donors or repeated experiments."
    )


def _through(recipe: Recipe) -> str:
    how = recipe.propagation
    if how is None or not recipe.perturbation:
        return ""
    return (
        f", spread through the signed network {how.network_name} (SHA-256 {how.network_sha256}; "
        f"{_count(how.steps, 'step')}, clipped to quantiles {how.quantiles[0]:g} to {how.quantiles[1]:g})"
    )


def screen_method(screen: Screen, result: ScreenResult, origin: Origin) -> str:
    """The screen as a paper's method section would describe it."""
    recipe, n = screen.recipe, len(screen.candidates)
    drawn = min(screen.keep, n)
    own = f" after {label(recipe.perturbation)} in every arm" if recipe.perturbation else ""
    scope = {
        "knock-out": "Genes that no chosen cell expresses were left out: their knock-out changes nothing. ",
    }.get(_kind(screen), "")
    ranked = {"shift": "the Euclidean change of the expected root counts of all neighbours"}.get(
        screen.readout, f"the expected change of {screen.readout}"
    )
    tested = int(result.confirmed["p"].notna().sum()) if len(result.confirmed) else 0
    return (
        f"{_count(n, _kind(screen))} were compared, each by itself in the raw counts of {_cells(recipe.cell_ids)} "
        f"({origin.source}, SHA-256 {recipe.data_sha256}){own}. {scope}First, every candidate was embedded and "
        "encoded, and the model's niche network gave the neighbours that it expects; candidates were ranked by "
        f"{ranked}, averaged over cells, without drawing. {matched_in_words(n)} "
        f"Second, the leading {drawn} were drawn beside the unedited niche. {_drawing(recipe, origin)} "
        f"Both arms shared all noise of a seed. {_reading()} Noise seeds {seeds_in_words(screen.first_seeds)} chose "
        "the better half, by the largest paired difference in standard errors; effects, intervals and p-values come "
        f"from the further seeds {seeds_in_words(screen.further_seeds)} alone, which took no part in the choice. "
        f"{_statistics(*screen.design, f'all {tested} tested pairs of candidate and readout')} Shares of types that "
        "fewer than half of the picture pairs show in either arm were not tested (independent filtering, Bourgon et "
        "al. 2010). An effect is called replicated if both sets of "
        f"seeds agree in its sign. {_made_with(recipe, origin)} Screen SHA-256 {screen.hash}. All pictures are "
        "generated; intervals and p-values speak of this model's answer, not of donors or repeated experiments."
    )


def _drawing(recipe: Recipe, origin: Origin) -> str:
    embedding, z_c, z_e = origin.sizes
    sample, side = recipe.sample, origin.tile_px * origin.um_per_px
    return (
        f"Counts were embedded with scGPT (Cui et al. 2024; weights SHA-256 {origin.scgpt_sha256}; {embedding} numbers "
        f"per cell), the random draws for ties and gene subsampling (encoder seed {recipe.encoder_seed}) shared by all "
        f"arms. As in GE2Hist (Cai et al. 2025), two variational autoencoders turned each embedding into the posterior "
        f"means of a type state z_c ({z_c} numbers) and a niche state z_e ({z_e} numbers), and a diffusion model "
        f"conditioned on both by cross-attention drew H&E pictures of {origin.tile_px} x {origin.tile_px} px "
        f"({side:g} x {side:g} µm, {origin.um_per_px:g} µm per pixel) by {SOLVERS[sample.solver]} "
        f"({REFERENCES[sample.solver].partition(',')[0]}) in {_count(sample.steps, 'step')} at guidance "
        f"{sample.guidance:g}."
    )


def _reading() -> str:
    return (
        "Nuclei were located and typed in the pictures alone by the bundle's nuclei reader; density, the share of each "
        "type, and mean and variance of the edge-corrected distance to the nearest nucleus were computed per picture."
    )


def _made_with(recipe: Recipe, origin: Origin) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return (
        f"Computed with the GE2Hist digital twin (code fingerprint {origin.engine}; {versions}) and the model bundle "
        f"of SHA-256 {recipe.model_sha256}."
    )


def references(recipe: Recipe, screen: bool = False) -> list[str]:
    """Works that the method paragraph cites, in its order."""
    crossed = min(len(recipe.cell_ids), 2 if screen else len(recipe.seeds)) > 1
    names = [
        "GE2Hist",
        "scGPT",
        recipe.sample.solver,
        *(["crossed", "allowance"] if crossed else ["bootstrap", "allowance", "p"]),
        "q",
    ]
    names += ["filter"] * screen
    return [REFERENCES[name] for name in names]


def licences(recipe: Recipe, perturbations: Iterable[Perturbation] = ()) -> list[tuple[str, str]]:
    """What the report is made of, and under which terms: two columns.

    Parameters
    ----------
    perturbations: further ones than the recipe's own, of a screen.
    """
    text = SOURCES.read_text(encoding="utf-8") if SOURCES.is_file() else ""
    ours = set(re.findall(r"\b[0-9a-f]{64}\b", text))

    def terms(sha256: str, other: str) -> str:
        return "Apache-2.0, made by this project from simulated tissue" if sha256 in ours else other

    rows = [
        ("GE2Hist digital twin (code)", "Apache-2.0"),
        ("Model bundle", terms(recipe.model_sha256, "as whoever trained it says: see the model card")),
        ("Cells", terms(recipe.data_sha256, "as whoever supplied the file says")),
    ]
    names = {
        part.name for one in (recipe.perturbation, *perturbations) for part in one.parts if isinstance(part, EditSet)
    }
    if names & _library():
        rows.append(
            (
                "Curated signatures",
                "Apache-2.0; rows that choose genes of MSigDB Hallmark sets say so (MSigDB: CC BY 4.0, "
                "doi:10.1016/j.cels.2015.12.004); the source of every row is in assets/signatures/mechanisms.csv",
            )
        )
    if names - _library():
        rows.append(("Signatures or gene sets from a file", "as whoever supplied the file says"))
    if recipe.propagation is not None:
        rows.append((f"Network {recipe.propagation.network_name}", "as whoever supplied it says"))
    return rows + list(LIBRARIES.items())


def _library() -> set[str]:
    from perturb.signatures import LIBRARY_CSV, load_library

    return {signature.name for signature in load_library()} if LIBRARY_CSV.is_file() else set()
