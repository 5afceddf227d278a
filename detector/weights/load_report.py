"""Reports of which weights were loaded into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from detector.text import printable

if TYPE_CHECKING:
    from rich.table import Table


class LoadedPart(NamedTuple):
    """A row of a `LoadReport`."""

    part: str
    loaded: int
    total: int
    """Tensors, anchors or classes of the model."""
    note: str


class LoadReport(NamedTuple):
    """What was loaded from a source; rich prints it as a table."""

    source: str
    parts: list[LoadedPart]

    def __rich__(self) -> Table:
        from rich.table import Table  # not needed to read a checkpoint
        from rich.text import Text

        table = Table("part", "loaded", "of", "note", title=Text(f"weights loaded from {self.source}"))
        for row in self.parts:
            # Text, because names of files and classes may look like rich's markup
            table.add_row(row.part, str(row.loaded), str(row.total), Text(row.note))
        return table


def match_tensors(
    part: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, unused: Sequence[str] = ()
) -> tuple[dict[str, Tensor], LoadedPart]:
    """Select the weights that have the name and shape of a model's tensor, except batch norm's counters of steps.

    Args:
        part: name of the row.
        own: the model's state dict.
        weights: the state dict to load from.
        unused: names in the source that are not among the weights, for the note.

    Returns:
        The selected weights, and the row that reports them.
    """
    names = [k for k in own if not k.endswith("num_batches_tracked")]
    fitting = {k: weights[k] for k in names if k in weights and weights[k].shape == own[k].shape}
    notes = (
        ("other shape", [k for k in names if k in weights and k not in fitting]),
        ("not in the source", [k for k in names if k not in weights]),
        ("in the source but not used", unused),
    )
    note = "; ".join(f"{title}: {abbreviate(listed)}" for title, listed in notes if listed)
    return fitting, LoadedPart(part, len(fitting), len(names), note)


def abbreviate(names: Sequence[str], limit: int = 6) -> str:
    """Join the first names of a list, printable, and count the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more
