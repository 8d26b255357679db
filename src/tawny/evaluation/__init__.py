"""Measurements of a model: quality on texts and questions, speed, memory, and the zeros it holds."""
