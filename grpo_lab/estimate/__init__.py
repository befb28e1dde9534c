"""What a run will take of memory, from the model's config and the recipe alone: no weights are made or loaded."""
