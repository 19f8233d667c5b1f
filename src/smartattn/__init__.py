"""smartattn: ``attn_implementation="smart"`` for Hugging Face Transformers.

Importing the package registers the implementation:

>>> import smartattn  # doctest: +SKIP
>>> model = AutoModel.from_pretrained(name, attn_implementation="smart")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ._version import __version__

#: The lowest version of Transformers whose hooks smartattn is tested against.
MINIMUM_TRANSFORMERS = "5.17.0"


def _check_transformers() -> None:
    from packaging.version import Version

    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = None
    if installed is None or Version(installed) < Version(MINIMUM_TRANSFORMERS):
        found = "is not installed" if installed is None else f"{installed} is installed"
        raise ImportError(
            f"smartattn {__version__} needs transformers>={MINIMUM_TRANSFORMERS}, transformers "
            f"{found}; run: pip install 'transformers>={MINIMUM_TRANSFORMERS}'"
        )


_check_transformers()

from .backends.base import end_quarantine  # noqa: E402
from .choose import Decision, UnsupportedCallError, Verdict  # noqa: E402
from .control import configure, trace, use  # noqa: E402
from .explaining import explain  # noqa: E402
from .explanation import Explanation  # noqa: E402
from .integration import register  # noqa: E402
from .log import follow_transformers  # noqa: E402
from .padding_free import padded, padding_free  # noqa: E402
from .record import StackRow, Trace, TraceRow  # noqa: E402

follow_transformers()
register()

__all__ = [
    "Decision",
    "Explanation",
    "StackRow",
    "Trace",
    "TraceRow",
    "UnsupportedCallError",
    "Verdict",
    "__version__",
    "configure",
    "end_quarantine",
    "explain",
    "padded",
    "padding_free",
    "register",
    "trace",
    "use",
]
