"""Turns result files into tables and plots; runs nothing."""
