"""A model over many GPUs [V3 sections 3.2 and 3.4]."""
