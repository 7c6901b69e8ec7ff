"""Recipes: one YAML file says everything about a study. `schema` is what may stand in it; no torch here."""
