"""A model seen as a stack of blocks: where its weights come from, which of them can be pruned, how it is walked."""
