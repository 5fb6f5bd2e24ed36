"""Figures: the plots of runs and of attention, and the HTML explorer."""
