"""What is tried and measured, not computed: `tawny search` and `tawny fit`. This room may call pruning; pruning never calls it.

Both choose a `Level` (level.py) for each linear, and share what they choose with:

- A `Space` says which levels there are, and moves in them within a limit: weights (space.py), whole members and experts
  (member_space.py). A fit chooses kinds under the bytes of a model or of a token (limit.py).
- solving.py solves every linear at its levels in one walk; expert_levels.py scores experts in one. divergence.py scores models
  that are put together from levels, and scores.py keeps what is known. evolution.py tries such models; it does not know what a model is.

search.py and fit.py are the verbs, as lists of steps; searched.py and fitted.py are what is told and written. Only a search has
candidates.py and rehearsal.py. Only a fit chooses from single measurements (measuring.py, table.py), and packs its finalists.
"""
