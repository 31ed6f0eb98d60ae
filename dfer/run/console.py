"""Tables on a terminal, whatever its width."""

from rich.console import Console
from rich.table import Table


def show_table(*tables: Table) -> None:
    """Print the first of some tables that the terminal is wide enough for, else the last one: whole in any case.

    Rich by itself ends what does not fit with an ellipsis, figures too.
    """
    width, needed = Console().width, 0
    for table in tables:
        needed = Console(width=10_000).measure(table).minimum
        if needed <= width:
            break
    Console(highlight=False, width=max(needed, width)).print(table)
