"""The arithmetic under the blocks of a model, chosen once for a rank: torch's, or Muster's own in C++."""
