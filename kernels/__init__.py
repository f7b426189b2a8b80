"""Supports, operators and their references, projection, Inductor lowerings: these know nothing of plans or budgets."""

if __name__ == "kernels":
    raise ImportError("import pixelfly_compiler.kernels, not kernels: a second import would register operators twice")
