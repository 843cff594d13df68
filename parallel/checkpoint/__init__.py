"""A checkpoint on disk: where it lies, what its files hold, whether that is what a description reads. No torch."""
