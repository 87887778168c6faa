"""Plans: derivatives of a known structure, what they are made of, and their files."""
