"""Text to token samples, and what linears saw of them."""
