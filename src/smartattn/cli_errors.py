"""What the command line says of mistakes."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right, said in one line."""
