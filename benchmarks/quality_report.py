"""Tables and the figure of benchmarks/quality.py, from the results file alone."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import publish, table
from quality_results import Best, Family, Group, Record, Table, bytes_of
from quality_runs import RANKED, Scale

from loqt_scale.errors import UserError

HEADER = ["method", "rates", "seeds", "perplexity", "**/ full AdamW's**", "bits a byte", "state, MB"]
HEADER += ["of which optimizer's", "**bytes / full AdamW's**", "tokens/s"]
NAMES = {"adamw": "full-rank AdamW", "muon": "full-rank Muon", "galore": "GaLore", "apollo": "APOLLO"}
NAMES |= {"full": "full rank", "loqt": "LoQT"}
WORDS = {
    "Muon": {"optim.name": "muon"},
    "bfloat16 factors": {"model.dtype": "bfloat16", "model.trained_dtype": "bfloat16"},
    "8-bit states": {"optim.states": "int8"},
    "without quantization": {"loqt.quantization.weight": "none", "loqt.quantization.projection": "none"},
}
ADAMW: Family = ("adamw", ())


def publish_tables(groups: Iterable[Group], *, keep: bool) -> None:
    """Prints a table a group and, if `keep`, puts it into RESULTS.md."""
    for scale, _, known in groups:
        if known.records:
            title = f"Quality: {scale.title}, {scale.dtype}, {known.records[0]['text_name']}"
            publish(title, command_of(scale, known), text_of(scale, known), keep=keep, made=made(known.records))


def command_of(scale: Scale, known: Table) -> str:
    """What does these runs again."""
    words = f"python benchmarks/quality.py --preset {scale.preset} --steps {scale.steps} --batch {scale.batch}"
    words += f" --rank {scale.rank} --dtype {scale.dtype}"
    text = known.records[0]["text_name"]
    return words if text == "embedded corpus" else f"{words} --files {text.replace(',', '')}"


def made(records: list[Record]) -> str:
    """When, of which commits, and where."""
    dates, commits = (sorted({record[key] for record in records}) for key in ("date", "commit"))
    places = sorted({f"{record['device']} ({record['jobs']} at a time)" for record in records})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{span}, commit {', '.join(commits)}, {'; '.join(places)}"


def text_of(scale: Scale, known: Table) -> str:
    """The table of a group, and what its columns mean."""
    bests, base = known.every_best(), known.best(ADAMW)
    rows = [row(best, base, scale) for best in bests]
    lost = [name_of(family, scale) for family in known.by_family if known.best(family) is None]
    text = table(HEADER, rows) + "\n\n" + notes(known)
    return text + (f" Diverged at every rate: {'; '.join(lost)}." if lost else "")


def row(best: Best, base: Best | None, scale: Scale) -> list[object]:
    """One family's row."""
    record, perplexities = best.record, [own["perplexity"] for own in best.by_seed.values()]
    ratios = best.over(base) if base is not None else []
    share = f"{bytes_of(record) / bytes_of(base.record):.3f}" if base is not None else "-"
    edges = [whose for whose, there in (("linears'", best.at_edge), ("rest's", best.rest_at_edge)) if there]
    said = f", {' and '.join(edges)} at the edge" if edges else ""
    rates = f"{best.run.lr:g}, {best.run.rest:g} (of {best.tried}{said})"
    bits = sum(own["bits_per_byte"] for own in best.by_seed.values()) / len(best.by_seed)
    cells: list[object] = [name_of(best.run.family, scale), rates, len(best.by_seed), spread(perplexities, 3)]
    cells += [f"**{spread(ratios, 3)}**" if ratios else "-", f"{bits:.4f}", megabytes(bytes_of(record))]
    return [*cells, megabytes(record["state_bytes"]), f"**{share}**", f"{record['tokens_per_second']:,}"]


def notes(known: Table) -> str:
    """What a reader has to know of the columns."""
    return (
        "Perplexity: held-out text, 256 sequences, mean over seeds (lowest to highest). `/ full AdamW's`: over that of "
        "full-rank AdamW at its best rates, seed by seed. `rates`: of the linears, and of embeddings, norms and head; "
        "the best, from the first seed, of so many pairs tried (at the edge: the best rate of the linears, or that of "
        "the rest beside it, was the lowest or highest tried, or fewer than three were). `state`: measured, storages "
        "of weights (packed ones included), of all gradients at once, and of whatever the optimizer keeps; activations "
        "and a merge's working memory are not in it. tokens/s: of training alone, beside other runs. "
        f"{len(known.records)} runs."
    )


def spread(values: list[float], digits: int) -> str:
    """Mean, and the range if there are several."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def megabytes(size: int) -> str:
    """10^6 bytes."""
    return f"{size / 1e6:.2f}"


def name_of(family: Family, scale: Scale) -> str:
    """For people: the method, its rank, and what else is not as it would be."""
    method, variant = family
    own = dict(variant)
    rank = own.pop("loqt.rank", str(scale.rank) if method in RANKED else None)
    parts = [NAMES[method], *([] if rank is None else [f"rank {rank}"])]
    for words, settings in WORDS.items():
        if settings.items() <= own.items():
            own = {key: value for key, value in own.items() if key not in settings}
            parts.append(words)
    return ", ".join([*parts, *(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in own.items())])


# ---- the figure ----------------------------------------------------------------------------------------------------


def draw(groups: list[Group], path: Path) -> None:
    """Perplexity over bytes, both over full-rank AdamW's: one panel a group that has full-rank AdamW.

    Args:
        groups: What to show.
        path: An .svg or .png file.

    Raises:
        UserError: matplotlib is not installed, or nothing can be compared.
    """
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws, is not installed; write pip install 'loqt-scale[benchmarks]'")
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "quality", "font.size": 8}
    shown = [(scale, known, base) for scale, _, known in groups if (base := known.best(ADAMW)) is not None]
    if not shown:
        raise UserError("no run of full-rank AdamW is known, to which others are compared; write --run 'adamw lr=1e-3'")
    figure = Figure(figsize=(9, 3.2 * len(shown)), layout="constrained")
    for panel, (scale, known, base) in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        draw_panel(panel, scale, known, base)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_panel(panel: Any, scale: Scale, known: Table, base: Best) -> None:
    """One group's points, numbered as their names beside it, and, from several seeds, their range.

    Hollow: a family without a sweep of its own. Of these only those are shown that no other of their method beats in
    perplexity with as few bytes.
    """
    bests = [best for best in known.every_best() if best.over(base)]
    shown = [best for best in bests if best.rates >= 3 or not any(beats(other, best) for other in bests)]
    for number, best in enumerate(shown, 1):
        share, ratios = bytes_of(best.record) / bytes_of(base.record), best.over(base)
        mean, name = sum(ratios) / len(ratios), name_of(best.run.family, scale)
        ranges = [[max(0.0, mean - min(ratios))], [max(0.0, max(ratios) - mean)]]
        colour = "tab:red" if best.run.method == "loqt" else "tab:blue"
        label = f"{number}  {name}: {mean:.3f}, {share:.2f}"
        face = colour if best.rates >= 3 else "white"
        panel.errorbar(share, mean, ranges, fmt="o", color=colour, mfc=face, ms=4, label=label)
        panel.annotate(str(number), (share, mean), (4, 3), textcoords="offset points")
    for line, value in ((panel.axhline, 1.0), (panel.axvline, 1.0), (panel.axvline, 0.25)):
        line(value, color="grey", lw=0.5, ls=":")
    panel.set_xlim(left=0)
    panel.set_xlabel("bytes / full-rank AdamW's")
    panel.set_ylabel("held-out perplexity / full-rank AdamW's")
    panel.set_title(f"{scale.title}, {scale.dtype}, {known.records[0]['text_name']}", loc="left")
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handletextpad=0, fontsize=7)


def beats(one: Best, other: Best) -> bool:
    """Whether a family of the same method has a lower perplexity with as few bytes."""
    alike = one.run.method == other.run.method
    return alike and one.nats < other.nats and bytes_of(one.record) <= bytes_of(other.record)
