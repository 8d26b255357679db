"""Text from a model, token by token, on a CPU, with as little as possible between its matrix products."""
