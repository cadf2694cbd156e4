"""Checkpoints in, parameters out: readers, the conversion loop, the tensor cache, tokenizers."""
