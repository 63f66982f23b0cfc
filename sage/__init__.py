"""SAGE: preference alignment that spends gradients only on the pairs that deserve them."""
