"""A smaller dense checkpoint from one whose channels, heads or blocks are zero."""
