"""Figures: plots and the HTML explorer."""
