"""A table of what was found: aligned text for a terminal, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Cells as text, in rows under a header; the first ``names`` columns are aligned left, the numbers right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join("  ".join(map(self._padded, range(len(widths)), line, widths)) for line in lines)

    def html(self) -> str:
        """The same as an HTML table."""
        head, body = self._line("th", self.header), "".join(self._line("td", row) for row in self.rows)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def _padded(self, column: int, cell: str, width: int) -> str:
        return cell.ljust(width) if column < self.names else cell.rjust(width)

    def _line(self, tag: str, cells: Sequence[str]) -> str:
        sides = ["left" if column < self.names else "right" for column in range(len(cells))]
        inner = (
            f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"


class InNotebooks:
    """What a notebook shows as lines of text, and a table under them."""

    def _summary(self) -> str:
        raise NotImplementedError

    def _cells(self) -> Table:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self._summary())}</pre>{self._cells().html()}"
