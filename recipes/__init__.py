"""Recipes: YAML files that fully describe a run, packaged with the distribution."""
