"""Measurements of trained models and of saliency maps, one per file."""
