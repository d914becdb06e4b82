from typing import Any

from ._errors import explain


def check_json(value: Any, where: str, depth: int) -> None:
    """Raises `TypeError`, naming the place, unless `value` is what JSON has."""
    if depth > 100:
        raise TypeError(explain(f"`{where[:60]}...` is too deep.", "100 levels", "JSON values"))
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(explain(f"A key of `{where}` is not JSON.", repr(key), "a string"))
            check_json(item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]", depth + 1)
    else:
        raise TypeError(
            explain(
                f"`{where}` is not JSON.",
                f"{value!r} of type {type(value).__name__}",
                "None, a bool, int, float or str, or a list or dict of these",
            )
        )
