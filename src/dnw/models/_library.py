"""Libraries that networks come from, imported where one is made (extra ``vision``)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def library(name: str) -> Any:
    """A module of torchvision or timm.

    Raises:
        ImportError: it is not installed, or does not fit the installed torch.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{package} is not installed; hold your torch while you install it: pip freeze | grep '^torch' > keep.txt; "
            "pip install -c keep.txt '.[vision]' (docs/command.md, Keep your torch)"
        )
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        raise ImportError(f"torchvision does not fit the installed torch ({error}); install the two together") from None
