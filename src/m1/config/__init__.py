"""The recipe: schema, loading, and the hashes of its stages. Importable without torch."""
