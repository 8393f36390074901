"""What the notebooks of the book need around the mathematics: sources shown, figures drawn."""

from matplotlib.pyplot import subplots  # in the book's style, which mamba_book.figures sets

from mamba_book.checks import Checks
from mamba_book.diagram import block_diagram, three_blocks
from mamba_book.figures import COLORS, METHODS, figure
from mamba_book.heat import heat_text
from mamba_book.interactive import frames
from mamba_book.reference import relative_error
from mamba_book.source import show_source

__all__ = [
    "COLORS",
    "Checks",
    "METHODS",
    "block_diagram",
    "figure",
    "frames",
    "heat_text",
    "relative_error",
    "show_source",
    "subplots",
    "three_blocks",
]
