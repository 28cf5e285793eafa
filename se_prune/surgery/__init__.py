"""Taking channels out of a network for real, proving it, and repairing what is left."""
