"""Public functions and methods have type annotations."""

import importlib.resources
import inspect

import revnet_tf


def public_functions():
    """Yields the name and the function of all public functions and methods."""
    for module_name, module in inspect.getmembers(revnet_tf, inspect.ismodule):
        if module_name.startswith("_"):
            continue
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module_name}.{name}", value
            elif inspect.isclass(value):
                for method_name, method in inspect.getmembers(value, _is_own):
                    if method_name == "__init__" or not method_name.startswith("_"):
                        yield f"{module_name}.{name}.{method_name}", method


def _is_own(value):
    module = getattr(value, "__module__", None) or ""
    return inspect.isroutine(value) and module.startswith("revnet_tf")


def test_public_functions_and_methods_have_annotations():
    missing, functions = [], dict(public_functions())
    assert "layers.RevBlock.inverse" in functions
    for name, function in functions.items():
        signature = inspect.signature(function)
        missing += [
            f"{name}: {parameter.name}"
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty
            and parameter.name not in ("self", "cls")
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if signature.return_annotation is signature.empty and "__init__" not in name:
            missing.append(f"{name}: return")
    assert not missing


def test_annotations_are_offered_to_type_checkers():
    assert importlib.resources.files(revnet_tf).joinpath("py.typed").is_file()
