"""Public functions and methods have type annotations."""

import importlib.resources
import inspect

import revnet_tf


def public_functions():
    """Yields the name and the function of all public functions and methods."""
    modules = [x for x in vars(revnet_tf).values() if inspect.ismodule(x)]
    modules = [m for m in modules if m.__name__.split(".")[-1] in revnet_tf.__all__]
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or value_module(value) != module.__name__:
                continue
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for method_name, method in inspect.getmembers(
                    value, is_method_of_library
                ):
                    if method_name == "__init__" or not method_name.startswith("_"):
                        yield f"{module.__name__}.{name}.{method_name}", method


def value_module(value):
    return str(getattr(value, "__module__", ""))


def is_method_of_library(value):
    return inspect.isroutine(value) and value_module(value).startswith("revnet_tf")


def missing(name, function):
    """Returns the parameters without annotation, and whether the result has none."""
    signature = inspect.signature(function)
    names = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty
        and parameter.name not in ("self", "cls")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if signature.return_annotation is signature.empty and "__init__" not in name:
        names.append("return")
    return names


def test_parameters_and_results_have_annotations():
    functions = dict(public_functions())
    assert {"revnet_tf.layers.RevBlock.inverse", "revnet_tf.memory.plan"} <= {
        *functions
    }
    found = {name: missing(name, function) for name, function in functions.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_annotations_are_offered_to_type_checkers():
    assert importlib.resources.files(revnet_tf).joinpath("py.typed").is_file()
