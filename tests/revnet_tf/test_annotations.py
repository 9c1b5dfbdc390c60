"""Public functions and methods have type annotations."""

import importlib.resources
import inspect

import pytest

import revnet_tf


def public_functions():
    """Yields the name and the function of all public functions and methods."""
    modules = [x for x in vars(revnet_tf).values() if inspect.ismodule(x)]
    modules = [m for m in modules if m.__name__.split(".")[-1] in revnet_tf.__all__]
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or not _is_of_library(value):
                continue
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for method_name, method in inspect.getmembers(value, _is_method):
                    if method_name == "__init__" or not method_name.startswith("_"):
                        yield f"{module.__name__}.{name}.{method_name}", method


def _is_of_library(value):
    return getattr(value, "__module__", "").startswith("revnet_tf")


def _is_method(value):
    return inspect.isroutine(value) and _is_of_library(value)


@pytest.mark.parametrize("name, function", dict(public_functions()).items())
def test_parameters_and_result_have_annotations(name, function):
    signature = inspect.signature(function)
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty
        and parameter.name not in ("self", "cls")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if signature.return_annotation is signature.empty and "__init__" not in name:
        missing.append("return")
    assert not missing


def test_annotations_are_offered_to_type_checkers():
    assert importlib.resources.files(revnet_tf).joinpath("py.typed").is_file()
