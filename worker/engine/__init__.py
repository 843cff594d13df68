"""The leader of a replica: pages, sequences and the steps that it plans. Pure Python, no input or output."""
