"""Recurrent cells: descriptions from which everything else works, and the cells that come with the package."""

from lstm_triton.cells.cell import Cell, Parameter, of, register

__all__ = ["Cell", "Parameter", "of", "register"]
