"""The captioned model: text to picture and picture to text, one model family of its own (METHODS 7)."""
