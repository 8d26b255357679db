"""What every long verb stands on: a place to write, named steps, one walk over the blocks, and what memory that takes."""
