"""Process groups and the collectives over them: the half of `parallel` that needs torch."""
