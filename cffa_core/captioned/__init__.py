"""The captioned model: fundus images from text and text from fundus images (METHODS 7)."""
