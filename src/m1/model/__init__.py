"""The hybrid model on megatron-core."""
