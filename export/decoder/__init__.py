"""Decoders with a KV cache, of any family: weights, graphs, quantisation and parity."""
