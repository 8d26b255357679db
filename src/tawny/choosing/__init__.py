"""Search for an allocation by trying candidates on the model. This room may call pruning; pruning never calls it."""
