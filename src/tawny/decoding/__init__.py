"""Text from a model, token by token, on a CPU, with as little as possible between its matrix products.

The room knows no console and no protocol. A server stands in a room of its own above it and reads `stream`.
"""
