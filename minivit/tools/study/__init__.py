"""Study: accuracy over a grid of training photos and trained blocks."""
