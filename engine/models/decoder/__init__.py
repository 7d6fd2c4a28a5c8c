"""Decoders with a KV cache, of any family: caches, sessions, conversations, generation."""
