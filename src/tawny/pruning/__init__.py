"""The main job: open, profile, allocate, and for each block observe, solve, advance, write."""
