"""What the notebooks of the book need around the mathematics: sources shown, figures drawn."""

from matplotlib.pyplot import subplots  # in the book's style, which mamba_book.figures sets

from mamba_book.checks import checks_table
from mamba_book.diagram import block_diagram
from mamba_book.figures import COLORS, METHODS, figure
from mamba_book.heat import heat_text
from mamba_book.interactive import frames
from mamba_book.source import show_source

__all__ = [
    "COLORS",
    "METHODS",
    "block_diagram",
    "checks_table",
    "figure",
    "frames",
    "heat_text",
    "show_source",
    "subplots",
]
