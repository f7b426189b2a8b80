"""Supports, operators and their references, projection, Inductor lowerings: these know nothing of plans or budgets."""

if __name__ == "kernels":  # the repository's root is on sys.path: our modules are refused, they would register twice
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    # transformers looks for PyPI's package of this name: it gets that one, or what it takes for "not installed".
    _root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _spec = PathFinder.find_spec(__name__, [path for path in sys.path if os.path.realpath(path or ".") != _root])
    if _spec is not None and _spec.loader is not None and _spec.has_location:
        sys.modules[__name__] = _other = module_from_spec(_spec)
        _spec.loader.exec_module(_other)
    else:
        del __file__, __path__

        def __getattr__(name: str) -> object:
            if name == "__path__":  # `import kernels.ops`, `from kernels import ops`
                raise ImportError(
                    "import pixelfly_compiler.kernels, not kernels: it would register the operators twice"
                )
            raise AttributeError(f"module 'kernels' has no attribute {name!r}")
