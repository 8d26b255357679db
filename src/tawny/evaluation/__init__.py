"""Measuring models: perplexity over streamed blocks, and what a checkpoint really holds."""
