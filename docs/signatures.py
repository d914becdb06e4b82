"""Constructors in the reference: the fields of an Equinox module are its arguments."""

import inspect
from typing import Any

import griffe


class Signatures(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if "__init__" in cls.members or not cls.path.startswith("eqxmeta."):
            return
        try:
            signature = inspect.signature(griffe.dynamic_import(cls.path))
        except (ImportError, TypeError, ValueError):  # nothing that is called
            return
        first = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        parameters = griffe.Parameters(first, *map(_parameter, signature.parameters.values()))
        cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    kind = griffe.ParameterKind[parameter.kind.name.lower()]
    default = None if parameter.default is parameter.empty else repr(parameter.default)
    return griffe.Parameter(parameter.name, kind=kind, default=default)
