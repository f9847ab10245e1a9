"""A run: recipe, directory, stages, plan."""
