"""Lineage in MLflow."""
