"""The packages of the extra `data`, which are imported when they are needed."""

import importlib
from typing import Any

from .._errors import explain, is_missing


def need(module: str, caller: str) -> Any:
    """The imported `module`. Raises `ImportError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not is_missing(error, module):  # installed, and broken: the error says how
            raise
        message = f"`{caller}` needs a package that is not installed."
        received, expected = f"no {module.split('.')[0]}", "pip install 'eqxmeta[data]'"
        raise ImportError(explain(message, received, expected)) from error
