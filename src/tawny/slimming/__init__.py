"""A smaller dense checkpoint from one whose channels and heads are zero."""
