"""Forward passes of the model families. No parallelism in any of them."""
