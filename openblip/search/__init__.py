"""An index over images and texts, and its second stage."""
