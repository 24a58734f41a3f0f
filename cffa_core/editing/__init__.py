"""Editing pairs by text: LEDITS++ on two images under one mask (METHODS 5)."""
