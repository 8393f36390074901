"""What the notebooks of the book need around the mathematics: sources shown, figures drawn."""

from mamba_book.figures import COLORS, figure, subplots
from mamba_book.interactive import frames
from mamba_book.source import show_source

__all__ = ["COLORS", "figure", "frames", "show_source", "subplots"]
