"""Files of signatures -> :class:`perturb.signatures.Signature`: GMT, Enrichr libraries, tables, GCT, GCTX, h5ad."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import re
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ge2hist_core.files import separator_line
from ge2hist_core.types import BadInput
from perturb.edits import nearest_genes
from perturb.signatures import Signature, listed

__all__ = ["MAX_BYTES", "MAX_SIGNATURES", "read_signatures"]

MAX_BYTES = 100_000_000
"""Of a file. GCTX and h5ad are read by the parts that are asked for, text is read whole."""
MAX_TEXT_BYTES = 50_000_000
"""Gene sets and GCT. All sets of MSigDB and the largest libraries of Enrichr have up to some 30 MB."""
MAX_TABLE_BYTES = 25_000_000
"""A table of differential expression has about 100 bytes for each gene: twelve full transcriptomes of 20,000 genes.
Short rows, the most genes for their size, are read in seconds up to here."""
MAX_SIGNATURES = 50_000
"""More than the largest Enrichr library holds (33,132 LINCS terms)."""

Z_CUTOFF = 2.0
"""|z| from which CMap counts a gene as changed (Subramanian et al. 2017, doi:10.1016/j.cell.2017.10.049)."""

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`read_signatures`, checked."""

    names: tuple[str, ...] | None
    limit: int
    max_bytes: int
    padj_below: float | None
    base: float
    z_cutoff: float
    z_scale: float | None

    def __post_init__(self) -> None:
        if self.names == ():
            raise BadInput("The names of signatures to read are an empty list: give at least one, or None for all.")
        if not (math.isfinite(self.base) and self.base > 1):
            raise BadInput(f"The base of the logarithm is {self.base!r}: choose 2, 2.71828 or 10.")
        if self.padj_below is not None and not 0 < self.padj_below <= 1:
            raise BadInput(f"The limit of adjusted p-values is {self.padj_below!r}: choose a number from 0 to 1.")
        if not 0 <= self.z_cutoff < math.inf:
            raise BadInput(f"The cutoff of |z| is {self.z_cutoff!r}: choose a number from 0, such as 2.")
        if self.z_scale is not None and not 0 < self.z_scale < math.inf:
            raise BadInput(f"The log2 fold change per z is {self.z_scale!r}: choose a number above 0, or None.")

    def choose(self, present: Collection[str], path: Path) -> list[str]:
        """The asked names, all of them if none is asked for."""
        if self.names is None:
            if len(present) > self.limit:
                raise BadInput(
                    f"{path.name} holds {len(present):,} signatures, more than the limit of {self.limit:,}: "
                    "choose some by name."
                )
            return list(present)
        known = set(present)
        for name in self.names:
            if name not in known:
                near = nearest_genes(name, present) or list(present)[:3]
                raise BadInput(f"{path.name} has no signature {name!r}: choose for example {listed(near, 3)}.")
        return list(self.names)


def read_signatures(
    path: str | Path,
    *,
    names: Collection[str] | None = None,
    limit: int = MAX_SIGNATURES,
    max_bytes: int = MAX_BYTES,
    padj_below: float | None = None,
    base: float = 2.0,
    z_cutoff: float = Z_CUTOFF,
    z_scale: float | None = None,
) -> list[Signature]:
    """Signatures of a file, whose format is told from its content and suffix. Text formats may be gzipped.

    - **GMT**, Enrichr's libraries among them: sets ``X_UP`` and ``X_DN`` (also ``X up``, ``X-down``) become one signed
      signature X; a set without a direction is read as up, or as down in a file whose name ends in ``down``.
      ``GENE,weight``: weights order the genes, their size is not used. LINCS terms such as
      ``LJP005_A375_24H-afatinib-10`` name cell line, hours, drug and uM.
    - **CSV, TSV** with a header: gene and log2 fold change, optionally adjusted p-value and the name of one of several
      signatures, as DESeq2, limma, edgeR, Seurat, scanpy and pertpy write them; or gene and z-score; or gene and sign.
      Excel's line ``sep=;`` may stand first.
    - **GCT** 1.2 and 1.3, **GCTX**: one signature per column, symbols from the row metadata.
    - **h5ad** with scanpy's ``uns["rank_genes_groups"]``: one signature per group.

    z-scores (L1000 level 5) say how sure a change is, not how large. They are read as directions of the genes with
    |z| >= ``z_cutoff``, surest first, unless ``z_scale`` states a log2 fold change per unit of z; a note says which.

    Parameters
    ----------
    names: only these signatures, in this order.
    limit: most signatures that are read without ``names``.
    max_bytes: largest file, unpacked; of a matrix also the largest part that is read. Text has limits of its own
        below it: 50 MB for gene sets and GCT, 25 MB for tables.
    padj_below: only genes with a smaller adjusted p-value.
    base: of the logarithm that the fold changes have: 2, or e or 10 for natural or decadic ones (Seurat before 4).
    z_cutoff: least |z| of a gene whose direction is used.
    z_scale: log2 fold change per unit of z, None for directions alone.

    Returns
    -------
    list of Signature: at least one, in the order of the file or of ``names``.

    Raises
    ------
    BadInput: a file of another form, too large or damaged, an option out of range, nothing left.
    """
    path = Path(path)
    names = None if names is None else tuple(names)
    options = _Options(names, limit, max_bytes, padj_below, base, z_cutoff, z_scale)
    try:
        size, head = path.stat().st_size, _head(path)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{path.name} cannot be read ({why}): choose another file.") from None
    if size > max_bytes:
        raise _too_large(path, size, max_bytes)
    if head == HDF5_MAGIC:
        return _kept(_read_hdf5(path, options), path, options)
    text = _text(path, min(max_bytes, MAX_TEXT_BYTES))
    if re.match(r"#1\.[23]\s", text):
        return _kept(_read_gct(text, path, options), path, options)
    if _looks_like_gmt(text, path):
        return _read_gmt(text, path, options)
    if len(text) > MAX_TABLE_BYTES:
        raise _too_large(path, len(text), MAX_TABLE_BYTES, "a table")
    return _kept(_read_table(text, path, options), path, options)


def _kept(found: Iterable[Signature | None], path: Path, options: _Options) -> list[Signature]:
    """Those that are left after the cutoffs."""
    signatures = [signature for signature in found if signature is not None]
    if not signatures:
        cure = "lower the cutoffs" if options.padj_below is not None or options.z_cutoff else "choose another file"
        raise BadInput(f"{path.name} has no row with a gene and a change that passes the cutoffs: {cure}.")
    return signatures


def _head(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(8)


def _too_large(path: Path, size: int, max_bytes: int, what: str = "") -> BadInput:
    return BadInput(
        f"{path.name} holds {size / 1e6:,.1f} MB, more than the limit of {max_bytes / 1e6:,.1f} MB"
        f"{' for ' * bool(what)}{what}: choose fewer signatures or a smaller file."
    )


def _text(path: Path, max_bytes: int) -> str:
    """Unpacked, decoded text with ``\\n`` line ends."""
    data = path.read_bytes()
    if len(data) > max_bytes:
        raise _too_large(path, len(data), max_bytes, "text")
    if data.startswith(GZIP_MAGIC):
        try:
            with gzip.open(io.BytesIO(data)) as handle:
                data = handle.read(max_bytes + 1)
        except (OSError, EOFError, zlib.error):
            raise BadInput(f"{path.name} is a damaged gzip file: fetch it again.") from None
        if len(data) > max_bytes:
            raise _too_large(path, len(data), max_bytes, "text")
    if data.startswith(HDF5_MAGIC):
        raise BadInput(f"{path.name} is a packed HDF5 file: unpack it first.")
    if data.startswith(ZIP_MAGIC):
        raise BadInput(f"{path.name} is a zip archive or an Excel workbook: save it as CSV.")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise BadInput(f"{path.name} is not a text in UTF-8: save it as CSV in UTF-8.") from None
    if "\0" in text:
        raise BadInput(f"{path.name} is not a text file: save it as CSV, TSV or GMT.")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise BadInput(f"{path.name} is empty: choose a file with signatures.")
    return text


def _stem(path: Path) -> str:
    """File name without its suffixes .gz, .txt, .csv and the like."""
    name = path.name.removesuffix(".gz")
    return re.sub(r"\.(txt|tsv|csv|tab|gmt|gct|gctx|h5ad)$", "", name, flags=re.IGNORECASE) or name


# ---------------------------------- GMT

_DIRECTION = re.compile(r"(?P<stem>.*\S)[\s_-]+(?P<direction>up|dn|down)", re.IGNORECASE)
_LINCS_TERM = re.compile(
    r"(?P<plate>[A-Z0-9.]+)_(?P<cell>[A-Za-z0-9.]+)_(?P<hours>\d+(?:\.\d+)?)H[-_](?P<drug>.+)-(?P<um>\d+(?:\.\d+)?)"
)


def _looks_like_gmt(text: str, path: Path) -> bool:
    if path.name.lower().removesuffix(".gz").endswith(".gmt"):
        return True
    fields = text.lstrip("\n").partition("\n")[0].split("\t")
    described = len(fields) > 2 and (fields[1].strip().lower() in ("", "na") or fields[1].startswith("http"))
    return described and not _roles(fields).keys() & {"log2_fc", "z", "sign"}


def _read_gmt(text: str, path: Path, options: _Options) -> list[Signature]:
    sets: dict[str, dict[int, tuple[str, dict[str, float]]]] = {}
    default, notes = _default_direction(path)
    undirected = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, description, weights = _gmt_line(line, number, path)
        match = _DIRECTION.fullmatch(name)
        stem = match["stem"] if match else name
        sign = (1 if match["direction"].lower() == "up" else -1) if match else default
        if match is None:
            undirected.add(stem)
        if sign in sets.setdefault(stem, {}):
            raise BadInput(f"Line {number} of {path.name} names the set {name!r} again: leave one of them out.")
        sets[stem][sign] = (description, weights)
    return [
        _gmt_signature(stem, sets[stem], path, notes if stem in undirected else ())
        for stem in options.choose(sets, path)
    ]


def _default_direction(path: Path) -> tuple[int, tuple[str, ...]]:
    match = _DIRECTION.fullmatch(_stem(path))
    if match and match["direction"].lower() != "up":
        return -1, ("The file's name ends in 'down': its sets are read as down-regulated.",)
    return 1, ("A set without a direction is read as up-regulated.",)


def _gmt_line(line: str, number: int, path: Path) -> tuple[str, str, dict[str, float]]:
    """Name, description and gene -> weight of one line."""
    name, *rest = (field.strip() for field in line.split("\t"))
    genes = [field for field in rest[1:] if field]
    if not name or not genes:
        raise BadInput(
            f"Line {number} of {path.name} is no gene set: write a name, a description and genes, separated by tabs."
        )
    if "," not in line:
        return name, rest[0], dict.fromkeys(genes, 1.0)
    weights: dict[str, float] = {}
    for field in genes:
        gene, _, weight = field.rpartition(",")
        value = _as_float(weight) if gene else math.nan
        weights.setdefault(*((gene.strip(), value) if math.isfinite(value) else (field, 1.0)))
    return name, rest[0], weights


def _gmt_signature(
    name: str, directions: dict[int, tuple[str, dict[str, float]]], path: Path, notes: tuple[str, ...]
) -> Signature:
    weights = {sign: found for sign, (_, found) in directions.items()}
    both = weights.get(1, {}).keys() & weights.get(-1, {}).keys()
    pairs = [(gene, sign, w) for sign in (1, -1) for gene, w in weights.get(sign, {}).items() if gene not in both]
    if not pairs:
        raise BadInput(f"The sets of {name!r} in {path.name} have the same genes up and down: leave one out.")
    if both:
        notes += (f"Genes named both up and down were left out: {listed(sorted(both))}.",)
    pairs.sort(key=lambda pair: -abs(pair[2]))
    description = next((text for text, _ in directions.values() if text.lower() not in ("", "na")), "")
    term = _LINCS_TERM.fullmatch(name)
    return Signature(
        name=name,
        genes=tuple(gene for gene, _, _ in pairs),
        log2_fc=tuple(float(sign) for _, sign, _ in pairs),
        direction_only=True,
        source=description if description.startswith("http") else path.name,
        description=description,
        kind="drug" if term else "gene set",
        cell_line=term["cell"] if term else "",
        drug=term["drug"] if term else "",
        dose_um=float(term["um"]) if term else None,
        time_h=float(term["hours"]) if term else None,
        notes=notes,
    )


def _as_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---------------------------------- tables

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_STATED = _SEPARATORS | {"|": "vertical bars"}
"""With what a line ``sep=`` may state."""

_ROLES = {
    "gene": (
        *("symbol", "genesymbol", "hgncsymbol", "externalgenename", "genename", "genenames", "gene", "genes"),
        *("names", "name", "variable", "featurename", "feature", "geneid", "id", "unnamed0", ""),
    ),
    "log2_fc": (
        *("log2foldchange", "log2fc", "avglog2fc", "logfc", "logfoldchanges", "logfoldchange", "avglogfc", "lfc"),
    ),
    "z": ("zscore", "zscores", "z", "modz"),
    "sign": ("sign",),
    "padj": (
        *("padj", "adjpval", "adjpvalue", "pvalsadj", "pvaladj", "pvalueadj", "fdr", "qvalue", "qval", "bonferroni"),
        "nlog10bonferronipval",
    ),
    "name": (
        *("signature", "signaturename", "perturbagen", "perturbation", "pertiname", "drug", "compound", "contrast"),
        *("comparison", "group", "cluster", "term"),
    ),
}
"""Role of a column -> names, in lower case without other than letters and digits, preferred ones first. From DESeq2,
limma (logFC, adj.P.Val), edgeR (logFC, FDR), Seurat (avg_log2FC, p_val_adj), scanpy (names, logfoldchanges, pvals_adj),
pertpy (variable, log_fc, adj_p_value), CMap; the unnamed one is R's row names."""

_MISSING = {"", "na", "n/a", "nan", "null", "none", "-", ".", "inf", "-inf", "+inf"}


def _roles(header: Sequence[str]) -> dict[str, int]:
    """Role -> column."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    found = {role: next((plain.index(n) for n in names if n in plain), None) for role, names in _ROLES.items()}
    return {role: column for role, column in found.items() if column is not None}


def _header(lines: Sequence[str], path: Path, stated: str | None) -> tuple[str, list[str]]:
    """Separator and column names of a table's first two lines, with "" for row names that R left without one."""
    headers = {}
    for separator in (stated,) if stated else _SEPARATORS:
        try:
            header, *second = csv.reader(lines, delimiter=separator)
        except csv.Error:  # a field of 131,072 characters or more, or a quotation mark that never ends
            raise BadInput(f"The first lines of {path.name} are no table: save it as CSV, TSV or GMT.") from None
        if second and len(second[0]) == len(header) + 1:
            header = ["", *header]
        roles = _roles(header)
        if "gene" in roles and roles.keys() & {"log2_fc", "z", "sign"}:
            return separator, header
        headers[separator] = header
    separator = max(headers, key=lambda s: len(headers[s]))
    widest = headers[separator]
    if len(widest) == 1:
        raise BadInput(
            f"The first line of {path.name} is one column, {widest[0][:60]!r}: separate columns by commas, tabs or "
            "semicolons."
        )
    lacking = "genes" if "gene" not in _roles(widest) else "log2 fold changes"
    raise BadInput(
        f"{path.name}, read with {_STATED[separator]} as separators, has no column of {lacking} among "
        f"{listed(widest, 8)}: name the columns gene and log2FoldChange."
    )


def _read_table(text: str, path: Path, options: _Options) -> Iterator[Signature | None]:
    lines = enumerate(io.StringIO(text, newline="\n"), 1)  # does not hold all lines at once
    content = ((number, line) for number, line in lines if line.strip() and not line.startswith("#"))
    number, first = next(content, (0, ""))
    if stated := separator_line(first):
        number, first = next(content, (0, ""))
    if not first:
        raise BadInput(f"{path.name} holds comments alone: choose a file with genes.")
    second = [line for _, line in itertools.islice(lines, 1)]
    separator, header = _header([first, *second], path, stated)
    roles = _roles(header)
    if options.padj_below is not None and "padj" not in roles:
        raise BadInput(f"{path.name} has no column of adjusted p-values: add one named padj, or set no limit for it.")
    rest = itertools.chain(second, (line for _, line in lines))
    groups = _table_groups(rest, number, path, separator, header)
    unit = next(role for role in ("log2_fc", "z", "sign") if role in roles)
    column = header[roles[unit]]
    notes: tuple[str, ...] = ()
    if unit == "log2_fc" and options.base == 2 and "log2" not in column.lower():
        notes = (f"The fold changes in the column {column} are taken as log2.",)
    for name in options.choose(groups, path):
        genes, values, padj = groups[name]
        yield _assemble(
            name,
            genes,
            values,
            padj,
            unit,
            options,
            notes=notes,
            source=path.name,
        )


_Rows = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _table_groups(lines: Iterable[str], above: int, path: Path, separator: str, header: list[str]) -> dict[str, _Rows]:
    """Name of a signature -> its genes, changes and adjusted p-values ``[row]``, NaN where a cell is empty.

    ``lines`` are those below the header, ``above`` counts the others. The p-values are None without such a column.
    """
    roles = _roles(header)
    value_column = next(roles[role] for role in ("log2_fc", "z", "sign") if role in roles)
    # Columns are converted whole: a short row is read in about a microsecond.
    cells, numbers = _cells(lines, above, path, separator, header)
    genes = [text.strip() for text in cells[roles["gene"]]]
    genes = ["" if gene.lower() in ("na", "nan", "---") else gene for gene in genes]

    def column(i: int) -> np.ndarray:
        return _numbers(cells[i], header[i], path, numbers, decimal_comma=separator == ";")

    columns = [np.array(genes, dtype=object), column(value_column)]
    if "padj" in roles:
        columns.append(_p_values(column(roles["padj"]), header[roles["padj"]], path, numbers))
    if "name" not in roles:
        return {_stem(path): _rows(columns)}
    names = np.array([text.strip() or "unnamed" for text in cells[roles["name"]]], dtype=object)
    group, known = pd.factorize(names)
    order, ends = np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]
    parts = zip(*(np.split(values[order], ends) for values in columns), strict=True)
    return {name: _rows(part) for name, part in zip(known, parts, strict=True)}


def _rows(columns: Sequence[np.ndarray]) -> _Rows:
    return columns[0], columns[1], columns[2] if len(columns) > 2 else None


def _cells(
    lines: Iterable[str], above: int, path: Path, separator: str, header: list[str]
) -> tuple[dict[int, list[str]], Sequence[int]]:
    """Column -> its texts ``[row]``, for columns with a role, and the line of each row. Blank rows are left out."""
    used = sorted(set(_roles(header).values()))
    pick = itemgetter(*used)  # of at least two columns, gene and change
    rows, numbers = [], array("q")
    reader = csv.reader(lines, delimiter=separator)
    try:
        for row in reader:
            if not "".join(row).strip():
                continue
            if len(row) != len(header):
                raise BadInput(
                    f"Line {above + reader.line_num} of {path.name} has {len(row)} fields and the header "
                    f"{len(header)}: give every row the same columns."
                )
            rows.append(pick(row))
            numbers.append(above + reader.line_num)
    except csv.Error as error:
        number = above + reader.line_num
        raise BadInput(f"Line {number} of {path.name} cannot be read ({error}): save the file again.") from None
    if not rows:
        raise BadInput(f"{path.name} has a header and no rows: choose a file with genes.")
    table = np.array(rows, dtype=object)
    return {column: table[:, i].tolist() for i, column in enumerate(used)}, numbers


def _numbers(texts: list[str], column: str, path: Path, lines: Sequence[int], *, decimal_comma: bool) -> np.ndarray:
    """The numbers in a column ``[row]``, NaN where one is missing or infinite."""
    try:
        values = np.array(list(map(float, texts)))
    except ValueError:
        values = np.array(
            [_cell(text, column, path, line, decimal_comma) for text, line in zip(texts, lines, strict=True)]
        )
    return np.where(np.isfinite(values), values, np.nan)


def _p_values(values: np.ndarray, column: str, path: Path, lines: Sequence[int]) -> np.ndarray:
    """Adjusted p-values ``[row]`` of a column that holds them or -log10 of them."""
    if not column.lower().startswith("nlog10"):
        return values
    if (negative := np.flatnonzero(values < 0)).size:
        i = negative[0]
        raise BadInput(
            f"Line {lines[i]} of {path.name} has {values[i]:g} in the column {column}: give -log10 of a p-value, "
            "which is at least 0."
        )
    return 10.0**-values


def _cell(text: str, column: str, path: Path, line: int, decimal_comma: bool) -> float:
    """The number in a cell, NaN where it is missing or infinite."""
    text = text.strip()
    if text.lower() in _MISSING:
        return math.nan
    number = _as_float(text.replace(",", ".") if decimal_comma else text)
    if math.isnan(number):
        raise BadInput(f"Line {line} of {path.name} has {text!r} in the column {column}: give a number or NA.")
    return number


_KINDS = {"log2_fc": "differential expression", "z": "z-scores", "sign": "mechanism"}


def _assemble(
    name: str,
    genes: np.ndarray,
    values: np.ndarray,
    padj: np.ndarray | None,
    unit: str,
    options: _Options,
    *,
    notes: tuple[str, ...] = (),
    **about: Any,
) -> Signature | None:
    """One signature from ``[row]`` arrays; None if the cutoffs leave nothing.

    ``unit`` is ``"log2_fc"`` (of base ``options.base``), ``"z"`` or ``"sign"``.
    """
    usable = np.isfinite(values) & (genes != "")
    if dropped := int((~usable).sum()):
        notes += (f"{dropped} rows without a gene or a finite number were left out.",)
    p = np.ones(len(values)) if padj is None else np.where(np.isnan(padj), 1.0, padj)
    if options.padj_below is not None and padj is not None:
        passing = p < options.padj_below
        if failing := int((usable & ~passing).sum()):
            notes += (f"{failing} rows with an adjusted p-value of {options.padj_below:g} or more were left out.",)
        usable &= passing
    if unit == "z" and options.z_scale is None:
        usable &= np.abs(values) >= max(options.z_cutoff, np.finfo(float).tiny)
    rows, repeated = _without_repeats(np.flatnonzero(usable), genes, values, p)
    if not len(rows):
        return None
    if repeated:
        rule = "largest change" if padj is None else "smallest adjusted p-value"
        notes += (f"Of genes with several rows the one with the {rule} was kept: {listed(repeated)}.",)
    if unit == "z":
        rows = rows[np.argsort(-np.abs(values[rows]), kind="stable")]
        notes += (_z_note(options),)
    direction_only = unit == "sign" or (unit == "z" and options.z_scale is None)
    return Signature(
        name=name,
        genes=tuple(genes[rows]),
        log2_fc=tuple(_log2(values[rows], unit, options).tolist()),
        direction_only=direction_only,
        padj=None if padj is None else tuple(p[rows].tolist()),
        kind=_KINDS[unit],
        notes=notes,
        **about,
    )


def _without_repeats(
    rows: np.ndarray, genes: np.ndarray, values: np.ndarray, p: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Rows with each gene once, in their order, and the genes that had several."""
    order = rows[np.lexsort((-np.abs(values[rows]), p[rows]))]
    gene, names = pd.factorize(genes[order])
    first = np.zeros(len(order), dtype=bool)
    first[np.unique(gene, return_index=True)[1]] = True
    return np.sort(order[first]), list(dict.fromkeys(names[gene[~first]]))


def _log2(values: np.ndarray, unit: str, options: _Options) -> np.ndarray:
    if unit == "log2_fc":
        return values * math.log2(options.base)
    if unit == "z":
        return np.sign(values) if options.z_scale is None else values * options.z_scale
    return values


def _z_note(options: _Options) -> str:
    if options.z_scale is None:
        return (
            "The values are z-scores, which say how sure a change is and not how large: only the directions of genes "
            f"with |z| of at least {options.z_cutoff:g} are used."
        )
    return f"The values are z-scores; {options.z_scale:g} log2 fold change per unit of z is assumed."


# ---------------------------------- GCT and GCTX (Enache et al. 2019, doi:10.1093/bioinformatics/bty784)

_SYMBOL_COLUMNS = ("pr_gene_symbol", "gene_symbol", "symbol", "Description")
_CELL_COLUMNS = ("cell_iname", "cell_id", "cell_line")
_DRUG_COLUMNS = ("cmap_name", "pert_iname", "pert_desc")
_NO_VALUE = ("-666", "-666.0", "na", "nan", "---", "")
"""CMap writes -666 for "unknown"."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    """What a GCT or GCTX file says beside its numbers: ``[row]`` symbols, ``[column]`` ids and metadata."""

    genes: np.ndarray
    columns: list[str]
    metadata: dict[str, list[str]]

    def about(self, column: int) -> dict[str, Any]:
        def first(names: Sequence[str]) -> str:
            values = (self.metadata[name][column] for name in names if name in self.metadata)
            return next((value for value in values if value.strip().lower() not in _NO_VALUE), "")

        return {"cell_line": first(_CELL_COLUMNS), "drug": first(_DRUG_COLUMNS)}

    def check(self, path: Path, n_rows: int) -> None:
        if len(self.genes) != n_rows or any(len(v) != len(self.columns) for v in self.metadata.values()):
            raise BadInput(f"{path.name} has metadata of another size than its matrix: fetch the file again.")
        if len(set(self.columns)) != len(self.columns):
            twice = next(name for name in self.columns if self.columns.count(name) > 1)
            raise BadInput(f"{path.name} has two columns named {twice!r}: rename one.")


def _symbols(metadata: dict[str, list[str]], ids: list[str]) -> np.ndarray:
    """``[row]`` symbols, empty where unknown; the row ids if no metadata has any."""
    found = next((metadata[name] for name in _SYMBOL_COLUMNS if name in metadata), None)
    if found is None or all(value.strip().lower() in _NO_VALUE for value in found):
        found = ids
    symbols = [value.strip() for value in found]
    return np.array(["" if symbol.lower() in _NO_VALUE else symbol for symbol in symbols], dtype=object)


def _column_signatures(
    matrix: _Matrix, values: np.ndarray, chosen: Sequence[str], path: Path, options: _Options
) -> Iterator[Signature | None]:
    """One signature per chosen column of ``values [row, chosen]``, which are z-scores."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() >= 0:
        raise BadInput(
            f"{path.name} has no negative value, as expression levels have none: give z-scores (level 5) or log2 fold "
            "changes."
        )
    place = {name: i for i, name in enumerate(matrix.columns)}
    for i, name in enumerate(chosen):
        about = matrix.about(place[name])
        yield _assemble(name, matrix.genes, values[:, i], None, "z", options, source=path.name, **about)


def _read_gct(text: str, path: Path, options: _Options) -> Iterator[Signature | None]:
    lines = text.rstrip("\n").split("\n")
    n_rows, n_columns, n_row_meta, n_column_meta = _gct_sizes(lines, path)
    first, start = 1 + n_row_meta, 3 + n_column_meta
    head = [line.split("\t") for line in lines[2:start]]
    if len(lines) != start + n_rows or any(len(fields) != first + n_columns for fields in head):
        raise _other_sizes(path, n_rows, n_columns)
    names = [name.strip() for name in head[0]]
    columns = names[first:]
    chosen = options.choose(columns, path)
    where = [first + columns.index(name) for name in chosen]
    described: list[list[str]] = []
    values = np.empty((n_rows, len(where)))
    for i, line in enumerate(lines[start:]):
        fields = line.split("\t")
        if len(fields) != first + n_columns:
            raise _other_sizes(path, n_rows, n_columns)
        described.append(fields[:first])
        values[i] = [_cell(fields[j], names[j], path, start + i + 1, decimal_comma=False) for j in where]
    row_meta = {name: [fields[j] for fields in described] for j, name in enumerate(names[:first])}
    metadata = {fields[0]: fields[first:] for fields in head[1:]}
    matrix = _Matrix(_symbols(row_meta, [fields[0] for fields in described]), columns, metadata)
    matrix.check(path, n_rows)
    yield from _column_signatures(matrix, values, chosen, path, options)


MAX_DIGITS = 15
"""Of a size in the second line: more than any file has, and few enough for every number there to be read."""


def _gct_sizes(lines: Sequence[str], path: Path) -> tuple[int, int, int, int]:
    """Rows, columns, columns of row metadata, lines of column metadata."""
    fields = lines[1].split() if len(lines) > 1 else []
    sizes = [int(field) for field in fields if field.isdecimal() and len(field) <= MAX_DIGITS]
    expected = 2 if lines[0].startswith("#1.2") else 4
    if len(sizes) != expected or len(lines) < 3:
        raise BadInput(f"Line 2 of {path.name} must give {expected} sizes, as line 1 says: save the file again.")
    return (sizes[0], sizes[1], 1, 0) if expected == 2 else (sizes[0], sizes[1], sizes[2], sizes[3])


def _other_sizes(path: Path, n_rows: int, n_columns: int) -> BadInput:
    return BadInput(
        f"{path.name} states {n_rows} rows and {n_columns} columns and holds other ones: fetch the file again."
    )


def _read_hdf5(path: Path, options: _Options) -> Iterator[Signature | None]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "0/DATA/0/matrix" in file:
                yield from _read_gctx(file, path, options)
            elif "uns/rank_genes_groups" in file:
                yield from _read_ranked(file["uns/rank_genes_groups"], path, options)
            else:
                raise BadInput(
                    f"{path.name} holds neither a GCTX matrix nor scanpy's rank_genes_groups: choose another file."
                )
    except BadInput:
        raise
    except (  # h5py meets damage with any of these
        *(AttributeError, IndexError, KeyError, MemoryError),
        *(OSError, OverflowError, RuntimeError, TypeError, ValueError),
    ):
        raise BadInput(f"{path.name} is a damaged or incomplete HDF5 file: fetch it again.") from None


def _whole(dataset: Any, path: Path, options: _Options) -> Any:
    """All of an HDF5 dataset. Its size is looked at first: a file of a few kilobytes can state any."""
    size = dataset.size * dataset.dtype.itemsize
    if size > options.max_bytes:
        raise _too_large(path, size, options.max_bytes)
    return dataset[()]


def _strings(dataset: Any, path: Path, options: _Options) -> list[str]:
    """Values of an HDF5 dataset as text."""
    values = np.asarray(_whole(dataset, path, options)).ravel().tolist()
    return [v.decode("utf-8", "replace").strip("\0 ") if isinstance(v, bytes) else str(v) for v in values]


def _read_gctx(file: Any, path: Path, options: _Options) -> Iterator[Signature | None]:
    rows, columns = file["0/META/ROW"], file["0/META/COL"]
    stored, n_columns, n_rows = file["0/DATA/0/matrix"], columns["id"].size, rows["id"].size
    if stored.shape != (n_columns, n_rows):  # GCTX stores one row per column of the matrix
        raise BadInput(
            f"{path.name} has {n_columns} columns and {n_rows} rows and a stored matrix of shape {stored.shape}: "
            "fetch the file again."
        )
    ids, names = _strings(rows["id"], path, options), _strings(columns["id"], path, options)
    row_meta = {name: _strings(rows[name], path, options) for name in _SYMBOL_COLUMNS if name in rows}
    metadata = {
        name: _strings(columns[name], path, options) for name in (*_CELL_COLUMNS, *_DRUG_COLUMNS) if name in columns
    }
    matrix = _Matrix(_symbols(row_meta, ids), names, metadata)
    matrix.check(path, len(ids))
    chosen = options.choose(names, path)
    size = len(chosen) * len(ids) * 8
    if size > options.max_bytes:
        raise _too_large(path, size, options.max_bytes)
    place = {name: i for i, name in enumerate(names)}
    values = np.array([stored[place[name]] for name in chosen], dtype=np.float64).reshape(len(chosen), len(ids)).T
    yield from _column_signatures(matrix, values, chosen, path, options)


# ---------------------------------- h5ad


def _read_ranked(ranked: Any, path: Path, options: _Options) -> Iterator[Signature | None]:
    """scanpy's ``rank_genes_groups``: tables with one column per group; ``logfoldchanges`` are log2."""
    if "logfoldchanges" not in ranked:
        raise BadInput(
            f"The rank_genes_groups of {path.name} have no logfoldchanges: run scanpy with method wilcoxon or t-test."
        )
    names, changes = (_whole(ranked[name], path, options) for name in ("names", "logfoldchanges"))
    if getattr(names.dtype, "names", None) is None:
        raise BadInput(f"The rank_genes_groups of {path.name} are not in scanpy's layout: write the file with anndata.")
    padj = _whole(ranked["pvals_adj"], path, options) if "pvals_adj" in ranked else None
    if options.padj_below is not None and padj is None:
        raise BadInput(f"The rank_genes_groups of {path.name} have no pvals_adj: set no limit for adjusted p-values.")
    reference = _strings(ranked["params/reference"], path, options)[0] if "params/reference" in ranked else "unknown"
    for group in options.choose(names.dtype.names, path):
        genes = [g.decode("utf-8", "replace") if isinstance(g, bytes) else str(g) for g in names[group]]
        yield _assemble(
            group,
            np.array(genes, dtype=object),
            np.asarray(changes[group], dtype=np.float64),
            None if padj is None else np.asarray(padj[group], dtype=np.float64),
            "log2_fc",
            options,
            source=path.name,
            description=f"group {group} against {reference}",
        )
