"""From a Dynamo graph to a decision and a new graph: sites, roles, costs, allocation, rewrite."""

if __name__ == "passes":
    raise ImportError("import pixelfly_compiler.passes, not passes: a second import would register the operators twice")
