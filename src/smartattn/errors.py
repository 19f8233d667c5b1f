"""What the commands raise for the command line to print."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right, said in one line."""
