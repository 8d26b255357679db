"""What a person reads: the model card of a pruned checkpoint."""
