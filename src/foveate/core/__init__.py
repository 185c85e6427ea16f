"""The nouns of the library. Imports torch and nothing of any model framework."""
