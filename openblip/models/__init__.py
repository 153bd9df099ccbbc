"""The systems of the papers, one file each, and the bricks they are made of, one file each."""
